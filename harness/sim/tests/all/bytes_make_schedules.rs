//! Schedules out of bytes: quickcheck draws and shrinks them.

use cowbell_formats::Format;
use cowbell_sim::backend::Lie;
use cowbell_sim::choose::{Bytes, Choice, Chooser, Fifo};
use cowbell_sim::explore::{Counts, Failure, run};
use cowbell_sim::subjects::Image;
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Base, Budget, QUIET};
use quickcheck::{QuickCheck, quickcheck};

fn run_of(image: Image, bytes: &[u8]) -> Result<Vec<Choice>, Box<Failure>> {
    let at = |cluster| image.place(0, cluster);
    let workload = Workload::new([
        Request::write(at(0) + 300, 2048),
        Request::zero(at(1), image.cluster),
        Request::flush(),
        Request::read(at(0), image.cluster),
    ]);
    let budget = Budget { faults: 2, ticks: 1, stalls: true, ..QUIET };
    let world = Base::new(image, 4).expect("it is made").world(&workload, budget);
    let mut path = Vec::new();
    let mut chooser = Bytes::new(bytes.iter().copied());
    run(&world, &mut chooser, 4, &mut Counts::default(), &mut path).map(|_| path)
}

quickcheck! {
    fn any_bytes_are_a_run_that_holds(which: usize, bytes: Vec<u8>) -> bool {
        let format = Format::ALL[which % Format::ALL.len()];
        run_of(Image::new(format), &bytes).is_ok()
    }

    fn any_choice_can_be_made(count: u8, wanted: u8) -> bool {
        let among: Vec<Choice> = (0..=u32::from(count)).map(Choice::Submit).collect();
        let wanted = wanted as usize % among.len();
        let mut chosen = (0..among.len()).map(|n| Bytes::new([n as u8]).choose(&among));
        chosen.any(|which| which == wanted)
    }
}

#[test]
fn without_bytes_all_is_calm() {
    let image = Image::new(Format::Qed);
    let calm = run_of(image, &[]).expect("nothing goes wrong");
    assert!(calm.iter().all(|choice| !choice.is_fault()), "{calm:?}");
    assert_eq!(Bytes::new([]).choose(&calm[..1]), Fifo.choose(&calm[..1]));
}

/// A device that lies is found out by bytes alone.
#[test]
fn what_fails_is_found() {
    fn holds(bytes: Vec<u8>) -> bool {
        let image = Image { lie: Some(Lie::ShortIsWhole), ..Image::new(Format::Raw) };
        run_of(image, &bytes).is_ok()
    }
    let found = QuickCheck::new().tests(5000).quicktest(holds as fn(Vec<u8>) -> bool);
    assert!(found.is_err(), "it lies, and nobody notices");
}
