"""Each scenario of the catalogue is a named test: the table says which, and one that is gone or renamed is missed."""

# ruff: noqa: E501 — the names of tests
from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent

# The scenarios of docs/protocol.md, by number: what is seen, and the tests in which it is.
SCENARIOS = {
    1: "hypervisor/test_backup.py::test_every_kind_of_disk_goes_to_the_store_and_comes_home",  # L=P=B, no O
    2: "chaos/test_catalogue_guest.py::test_everything_dies_between_the_definitions_of_two_disks_and_the_backup_fails_but_nothing_is_lost",  # O empty
    3: "chaos/test_catalogue_libvirtd.py::test_switched_by_qemu_but_saved_by_no_one_the_guest_starts_on_its_overlay_and_comes_home",
    4: "chaos/test_catalogue_others.py::test_a_definition_that_a_user_puts_back_to_the_base_under_a_running_guest_is_put_right_at_once",
    5: "chaos/test_catalogue_others.py::test_a_snapshot_that_was_taken_though_its_call_says_it_failed_is_this_backups_own",
    6: "hypervisor/test_guardian.py::test_a_frozen_guest_thaws_though_nobody_starts_an_agent",
    7: "cluster/test_agent_killed.py::test_killed_while_copying_it_copies_again",
    8: "hypervisor/test_backup.py::test_a_full_store_fails_the_backup_and_the_guest_comes_home_all_the_same",
    9: "hypervisor/test_review.py::test_a_base_into_which_another_backup_has_begun_to_commit_is_never_copied",
    10: "chaos/test_catalogue_storage.py::test_a_full_file_system_of_the_overlays_ends_the_copy_and_the_paused_guest_is_brought_home",
    11: "chaos/test_catalogue_others.py::test_a_commit_that_somebody_aborts_is_made_again",
    12: "chaos/test_catalogue_libvirtd.py::test_a_libvirtd_that_stands_still_for_a_minute_loses_nothing_wherever_the_backups_are",
    13: "chaos/test_catalogue_guest.py::test_a_guest_that_stops_waits_on_its_overlay_and_comes_home_when_it_starts",
    14: "chaos/test_catalogue_guest.py::test_qemu_dies_in_the_pivot_and_the_guest_starts_on_what_holds_everything",
    15: "chaos/test_catalogue_guest.py::test_a_user_who_puts_the_definition_back_to_base_while_the_guest_is_off_is_warned_before_it_starts",
    16: "chaos/test_catalogue_guest.py::test_what_a_user_changes_in_the_definition_meanwhile_stays_changed",
    17: "chaos/test_catalogue_guest.py::test_a_guest_that_is_undefined_in_the_middle_comes_home_before_it_stops",
    18: "chaos/test_catalogue_others.py::test_an_overlay_that_somebody_puts_on_top_of_ours_is_left_alone_until_they_take_it_away",
    19: "hypervisor/test_backup.py::test_a_template_is_recorded_once_and_the_folder_restores_anywhere",
    20: "hypervisor/test_backup.py::test_a_base_that_another_domain_builds_on_is_refused",
    21: "chaos/test_catalogue_migration.py::test_a_guest_that_is_migrated_on_its_overlay_and_stays_defined_comes_home_by_the_sweep_there",
    22: "chaos/test_catalogue_others.py::test_two_agents_of_one_node_by_mistake_take_turns_at_a_domain",
    23: "hypervisor/test_convergence.py::test_a_commit_that_is_held_goes_on_beside_the_running_guest_and_everybody_hears_of_it",
    24: "hypervisor/test_backup.py::test_a_backup_deleted_in_the_middle_of_its_commit_comes_home_first",
    25: "cluster/test_api_server.py::test_with_the_api_server_away_for_the_whole_backup_the_guest_comes_home_and_its_status_says_so_later",
}
# How the first rules failed (docs/protocol.md), V1 to V13.
VIOLATIONS = {
    1: "chaos/test_catalogue_power.py::test_a_power_cut_within_a_backup_loses_nothing",
    2: "hypervisor/test_kill_points.py::test_qemu_killed_in_the_middle_of_a_backup_starts_again_with_all_that_was_written",
    3: "chaos/test_catalogue_power.py::test_a_power_cut_after_a_backup_loses_nothing",
    4: "chaos/test_catalogue_power.py::test_a_power_cut_after_a_backup_loses_nothing",
    5: "chaos/test_catalogue_power.py::test_a_power_cut_within_a_backup_loses_nothing",
    6: "chaos/test_catalogue_libvirtd.py::test_a_libvirtd_that_stands_still_for_a_minute_loses_nothing_wherever_the_backups_are",
    7: "chaos/test_catalogue_libvirtd.py::test_a_libvirtd_that_stands_still_for_a_minute_loses_nothing_wherever_the_backups_are",
    8: "chaos/test_catalogue_libvirtd.py::test_pivoted_by_qemu_but_saved_by_no_one_the_guest_runs_on_until_its_restart",
    9: "chaos/test_catalogue_libvirtd.py::test_switched_by_qemu_but_saved_by_no_one_the_guest_starts_on_its_overlay_and_comes_home",
    10: "chaos/test_catalogue_libvirtd.py::test_a_commit_whose_mirror_libvirt_does_not_know_is_pivoted_at_its_end",
    11: "chaos/test_catalogue_guest.py::test_qemu_dies_in_the_pivot_and_the_guest_starts_on_what_holds_everything",
    12: "chaos/test_catalogue_guest.py::test_everything_dies_between_the_definitions_of_two_disks_and_the_backup_fails_but_nothing_is_lost",
    13: "chaos/test_catalogue_storage.py::test_without_its_journal_a_backup_brings_home_what_it_left_and_takes_another_snapshot",
}
# What else may happen to a backup.
MISFORTUNES = {
    "the agent is killed at every step": "hypervisor/test_kill_points.py::test_a_driver_killed_at_any_moment_is_carried_on_and_nothing_is_lost",
    "the agent is killed at each kind of step": "hypervisor/test_kill_points.py::test_a_driver_killed_once_in_each_kind_of_moment_is_carried_on_and_nothing_is_lost",
    "libvirtd is killed": "hypervisor/test_kill_points.py::test_libvirtd_killed_in_the_middle_of_a_backup_comes_back_to_guests_that_lose_nothing",
    "QEMU is killed": "hypervisor/test_kill_points.py::test_qemu_killed_in_the_middle_of_a_backup_starts_again_with_all_that_was_written",
    "libvirtd dies in a user's snapshot": "chaos/test_catalogue_libvirtd.py::test_switched_in_a_snapshot_of_a_users_own_the_guest_comes_home_by_what_the_messages_advise",
    "libvirt forgets a guest that runs": "chaos/test_catalogue_libvirtd.py::test_a_guest_that_libvirt_has_forgotten_keeps_its_overlay_and_comes_home_once_a_human_has_ended_it",
    "power-off, destroy": "chaos/test_catalogue_guest.py::test_a_guest_that_stops_waits_on_its_overlay_and_comes_home_when_it_starts",
    "reboot, reset": "chaos/test_catalogue_guest.py::test_a_guest_that_boots_again_does_so_on_its_overlay_and_comes_home_all_the_same",
    "migrated in the commit": "chaos/test_catalogue_migration.py::test_a_migration_in_the_middle_of_the_commit_is_refused_and_the_backup_comes_home",
    "migrated on the overlay, and undefined": "chaos/test_catalogue_migration.py::test_a_guest_that_is_migrated_on_its_overlay_and_undefined_comes_home_by_the_next_backup_there",
    "migrated, and libvirtd has forgotten it": "chaos/test_catalogue_migration.py::test_a_migrated_guest_that_is_off_there_too_is_not_merged_here_though_libvirtd_has_forgotten_that_it_was_migrated",
    "a migration that is aborted": "chaos/test_catalogue_migration.py::test_a_backup_of_a_guest_that_is_being_migrated_begins_when_that_was_aborted",
    "migrated before the snapshot": "chaos/test_catalogue_migration.py::test_a_backup_that_has_waited_for_a_migration_is_refused_when_its_guest_has_gone",
    "undefine": "chaos/test_catalogue_guest.py::test_a_guest_that_is_undefined_in_the_middle_comes_home_before_it_stops",
    "the base's file system is full": "chaos/test_catalogue_storage.py::test_a_full_file_system_of_the_base_keeps_the_guest_on_its_overlay_until_there_is_room",
    "the configuration's is full": "chaos/test_catalogue_storage.py::test_a_configuration_that_cannot_be_saved_after_a_switch_never_keeps_the_guest_suspended",
    "the store is full": "hypervisor/test_backup.py::test_a_full_store_fails_the_backup_and_the_guest_comes_home_all_the_same",
    "the store is read-only": "chaos/test_catalogue_storage.py::test_a_store_that_goes_read_only_fails_the_backup_and_the_guest_comes_home",
    "an image is replaced or truncated": "chaos/test_catalogue_storage.py::test_nothing_is_merged_into_a_base_that_is_another_file_now_until_the_original_is_back",
    "an overlay is removed or replaced": "chaos/test_catalogue_storage.py::test_an_overlay_that_somebody_removes_or_replaces_under_the_guest_is_merged_all_the_same",
    "two agents": "cluster/test_api_server.py::test_a_second_agent_for_the_same_node_touches_neither_guest_nor_status_nor_finalizer",
    "409 Conflict": "cluster/test_api_server.py::test_while_others_write_to_the_same_object_all_the_time_their_writes_and_its_status_both_arrive",
    "deleted and made again": "cluster/test_api_server.py::test_deleted_and_made_again_with_the_same_name_each_is_itself",
    "the clock jumps": "chaos/test_catalogue_others.py::test_a_clock_that_jumps_by_ten_years_changes_nothing",
    "the agent is upgraded": "cluster/test_api_server.py::test_an_agent_of_a_newer_version_carries_on_what_the_older_one_had_begun",
    "the journal is lost": "cluster/test_orphans.py::test_a_guest_that_a_lost_backup_left_suspended_runs_again_within_seconds_of_the_agents_start",
    "the guest agent hangs": "hypervisor/test_guest_agent.py::test_a_backup_goes_on_without_an_agent_that_hangs",
}


@pytest.mark.parametrize("named", sorted({*SCENARIOS.values(), *VIOLATIONS.values(), *MISFORTUNES.values()}))
def test_the_test_of_a_scenario_is_there(named: str) -> None:
    path, _, function = named.partition("::")
    assert re.search(rf"^def {function}\(", (TESTS / path).read_text(), re.MULTILINE), f"{path} has no {function}"


def test_every_scenario_has_its_test() -> None:
    assert SCENARIOS.keys() == set(range(1, 26))
    assert VIOLATIONS.keys() == set(range(1, 14))
