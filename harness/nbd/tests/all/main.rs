//! Both sides of the protocol, driven without a socket; and the backend of remote disks, over real ones.

mod clients_are_answered;
mod connections_are_made_again;
mod every_order_ends_well;
mod hostile_clients_do_no_harm;
mod hostile_servers_do_no_harm;
mod images_lie_on_remote_disks;
mod remote_files_keep_the_contract;
mod servers_of_few_words;
mod serving;
mod side;
