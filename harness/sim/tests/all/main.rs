//! One program with all tests of this crate: it is linked once.

mod all_ends_when_faults_are_over;
mod bytes_make_schedules;
mod canary;
mod causes;
mod contract;
mod copies_of_real_runs_are_varied;
mod cpu_work_completes_when_chosen;
mod damage_is_noticed;
mod drivers_of_others;
mod embedders_runs_are_done_again;
mod first_writes_wait_little;
mod gate;
mod guests_wait;
mod images_of_real_runs;
mod lives_are_mixed;
mod mutants;
mod orders_left_out_lead_nowhere_else;
mod random;
mod regressions;
mod runs_can_be_seen;
mod sleep_sets_leave_out_no_ending;
mod traces_become_smaller;
mod traces_survive_being_text;
mod where_a_request_stands_makes_no_difference;
