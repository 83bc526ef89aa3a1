//! Sleep sets, which are measured: they leave files in every way that a plain search does, after fewer
//! choices.

use cowbell_formats::Format;
use cowbell_sim::sleep::measured;

#[test]
fn of_all_formats() {
    for format in Format::ALL {
        let (plain, slept) = measured(format).unwrap_or_else(|why| panic!("{why}"));
        assert!(slept < plain, "{format}: {slept} of {plain}: nothing was left out");
        println!("{format}: {:.2} times as many choices without", plain as f64 / slept as f64);
    }
}
