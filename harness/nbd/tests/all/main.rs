//! The server's side of the protocol, driven without a socket.

mod clients_are_answered;
mod hostile_clients_do_no_harm;
mod side;
