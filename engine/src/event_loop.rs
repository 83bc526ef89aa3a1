//! A ready-made loop for programs that have none: waits for a backend's descriptor or for a moment.
//!
//! The [crate's documentation](crate#embedding) has a whole program around one. An emulator has a
//! loop of its own and adds the descriptor to that instead.
//!
//! mio reports edges, not levels: a descriptor that was readable before and still is, is not
//! reported again. That suits a backend, whose descriptor is signalled anew for whatever is done
//! after a harvest, and asks one thing of the caller: run the engine until it says that it has
//! nothing more to do, then wait.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};

use crate::units::Time;

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The backend: there is something to harvest, or was until a moment ago.
    Backend,
    /// The moment that was waited for, or a signal handler, or somebody with a waker.
    Time,
}

/// Waits. See the module.
#[derive(Debug)]
pub struct EventLoop {
    poll: Poll,
    events: Events,
    has_backend: bool,
}

impl EventLoop {
    /// A loop around a backend's [`event_fd`](crate::backend::Backend::event_fd), which stays
    /// open for as long as the loop is used.
    pub fn new(fd: Option<BorrowedFd<'_>>) -> io::Result<EventLoop> {
        let poll = Poll::new()?;
        if let Some(fd) = fd {
            let fd = fd.as_raw_fd();
            poll.registry().register(&mut SourceFd(&fd), BACKEND, Interest::READABLE)?;
        }
        Ok(EventLoop { poll, events: Events::with_capacity(4), has_backend: fd.is_some() })
    }

    /// What another thread ends a wait with: one that reads what people type, for example. To be
    /// made once for a loop, and kept: a waker that is gone takes its wake-ups along.
    pub fn waker(&self) -> io::Result<Waker> {
        Waker::new(self.poll.registry(), WAKER)
    }

    /// Waits for the backend or until `until`; without the latter for the backend alone. Ends up
    /// to a millisecond late.
    ///
    /// A backend without a descriptor has everything ready at once, so there is nothing to wait
    /// for but time; without `until`, this returns immediately.
    pub fn wait(&mut self, until: Option<Time>, now: Time) -> io::Result<Woken> {
        let timeout = match until {
            Some(until) => Some(Duration::from_nanos(until.since(now))),
            None if self.has_backend => None,
            None => Some(Duration::ZERO),
        };
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Woken::Time),
            Err(error) => Err(error),
            Ok(()) if self.events.iter().any(|event| event.token() == BACKEND) => {
                Ok(Woken::Backend)
            }
            Ok(()) => Ok(Woken::Time),
        }
    }
}

const BACKEND: Token = Token(0);
const WAKER: Token = Token(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::clock;
    use crate::sys::syscalls::EventFd;

    #[test]
    fn wakes_for_the_backend_each_time_it_signals() {
        let event = EventFd::new().expect("an eventfd");
        event.signal(); // before anybody looks
        let mut events = EventLoop::new(Some(event.borrow())).expect("a loop");
        for _ in 0..3 {
            assert_eq!(events.wait(None, clock()).expect("it waits"), Woken::Backend);
            event.clear();
            let now = clock();
            assert_eq!(events.wait(Some(now), now).expect("it looks"), Woken::Time);
            event.signal();
        }
    }

    #[test]
    fn wakes_when_it_is_time_and_not_before() {
        let event = EventFd::new().expect("an eventfd");
        for fd in [Some(event.borrow()), None] {
            let mut events = EventLoop::new(fd).expect("a loop");
            let now = clock();
            let until = now.plus_ms(20);
            assert_eq!(events.wait(Some(until), now).expect("it waits"), Woken::Time);
            assert!(clock() >= until);
        }
    }

    #[test]
    fn wakes_when_another_thread_says_so() {
        let event = EventFd::new().expect("an eventfd");
        let mut events = EventLoop::new(Some(event.borrow())).expect("a loop");
        let waker = events.waker().expect("a waker");
        std::thread::scope(|scope| {
            scope.spawn(|| waker.wake().expect("it wakes"));
            assert_eq!(events.wait(None, clock()).expect("it waits"), Woken::Time);
        });
    }

    #[test]
    fn without_anything_to_wait_for_it_does_not() {
        let mut events = EventLoop::new(None).expect("a loop");
        assert_eq!(events.wait(None, clock()).expect("it looks"), Woken::Time);
    }
}
