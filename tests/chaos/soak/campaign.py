"""Carries out the plans of one guest, and plays the humans who start it again, free space and ask for a retry."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tests.chaos.soak import proof
from tests.chaos.soak.choices import HANDS_ON_IMAGES, STALL_PAUSE_SECONDS, Fault, Plan
from tests.chaos.soak.driving import Driving, Ended, Task
from tests.chaos.soak.faults import FAULTS
from tests.chaos.soak.guests import Subject
from tests.chaos.soak.scene import NotNowError, Undo
from tests.chaos.soak.tally import Tally
from vmbackup.errors import PermanentError
from vmbackup.protocol.record import Guard, Record
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.state.journal import record_of
from vmbackup.reconcile.steps.step import Ending

HOME_SECONDS = 180.0  # at most, after the last fault: barriers of 31 s, attempts, a boot
SUSPENDED_SECONDS = 5.0
SUSPENDED_SECONDS_IN_DOUBT = 45.0  # where a call was left unanswered
_LOOK_SECONDS = 0.25
_CONVERGING_SECONDS = 60.0  # before a human looks why a commit does not end
_HUMAN_SECONDS = 3.0  # before a human resumes a guest that has stopped at an I/O error


def brief(record: Record | None) -> str:
    """A record without the XML."""
    if record is None:
        return "no journal"
    return str(replace(record.with_every_disk(persistent_disk_xml=""), domain_xml=""))


class StuckError(Exception):
    """A backup does not come to its end."""


class Campaign:
    """One guest, one plan after the other."""

    driving: Driving

    def __init__(self, subject: Subject, tally: Tally) -> None:
        self.host = subject.host
        self.subject = subject
        self.tally = tally
        self.uid = ""
        self.marks = subject.directory / "marks"
        self.plan = Plan(subject.name, 0, {}, (), delete_data=False, retain=False)

    def carry_out(self, plan: Plan) -> None:
        """One backup with its faults, until all is home again; then prove it. Raises what is wrong."""
        self.tally.note("plan", **plan.as_json())
        self._begin(plan)
        self._run_to_the_end()
        for fault in self._pending:
            self.tally.count(self.tally.idle, fault.kind)
        self._proven()
        if not plan.retain:
            self._delete()
        self.subject.clear_store()
        self.tally.note("end", plan=plan.name, outcome=self._outcome, seconds_taken=round(self._now() - self._begun, 1))
        self.tally.count(self.tally.backups, self._outcome)

    def _begin(self, plan: Plan) -> None:
        self.plan = plan
        self.uid = str(uuid.uuid4())
        self.uids = [self.uid]
        self._begun = self._now()
        self._fault_clock = self._begun
        self._pending = list(plan.faults)
        self._undos: list[tuple[float, Undo]] = []
        self._second: Driving | None = None
        self._restart_at: float | None = None
        self._changes: dict[str, object] = {}
        self._may_start = 0.0
        self._off_until = 0.0  # it may still end until then
        self._state: Power | None = None
        self._suspended_since: float | None = None
        self._in_doubt = False
        self._next_look = 0.0
        self._io_error_since: float | None = None
        self._restarted: set[str] = set()
        self._retries = 0
        self._outcome = ""
        self._stored_before = False  # without its journal, a backup does not take for its own what it had stored
        self._noted: Ended | None = None
        self._disturbances = self.host.disturbances
        self._start_driver()

    # -- the drivers

    @property
    def journal(self) -> Path:
        """Of the backup that runs."""
        return self.subject.state_dir / f"{self.uid}.journal"

    def record(self) -> Record | None:
        """What the journal says."""
        with suppress(PermanentError):
            return record_of(self.subject.state_dir, self.uid)
        return None

    def _task(self) -> Task:
        subject = self.subject
        return Task(
            uri=self.host.libvirtd.uri,
            config_dir=self.host.libvirtd.config_dir,
            state_dir=subject.state_dir,
            lock_dir=subject.directory / "locks",
            store=subject.store,
            serial_log=subject.serial_log,
            marks=self.marks,
            domain=subject.name,
            uid=self.uid,
            spec=self.plan.spec,
            hold_at=tuple(fault.at for fault in self._pending if fault.at),
            changes=self._changes,
            boot=self.host.boot,
        )

    def _start_driver(self) -> None:
        self._restart_at = None
        self._measure_from_now()
        self.driving = Driving(self._task())

    def kill_driver(self, again_after: float) -> None:
        """SIGKILL it; another is started after so many seconds."""
        self.driving.kill()
        self._restart_at = self._now() + again_after

    def stop_driver(self, again_after: float) -> None:
        """Tell it to stop; another is started after so many seconds."""
        self.driving.ask(stop=True)
        self._pause_after_stop = again_after

    def start_second_driver(self) -> None:
        """A second driver of the same backup, as of a second agent by mistake."""
        if self._second is not None:
            raise NotNowError
        self._second = Driving(replace(self._task(), hold_at=()))

    def cut_power(self, again_after: float) -> None:
        """Of the whole machine, on which nothing else runs then, but for what is to happen. It boots at once."""
        self.kill_driver(again_after)
        if self._second is not None:
            self._second.kill()
            self._second = None
        for _, undo in self._undos:
            with suppress(NotNowError):
                undo()
        self._undos = []
        self.host.cut_power()
        self.expect_off(again_after / 2)
        # libvirt makes no edit of a user durable: what is there now is what he has
        self.subject.description = proof.described(self.host.patiently(self.subject.guest.persistent_xml))

    def delete_backup(self) -> None:
        """The VMBackup is deleted."""
        self._changes = {"deleted": True, "delete_data": self.plan.delete_data}
        self.driving.ask(**self._changes)

    def expect_off(self, seconds: float, *, within: float = 0.0) -> None:
        """The guest ends, within so many seconds; a human starts it again after a while."""
        self._may_start = self._now() + seconds
        self._off_until = self._now() + within

    def found(self, what: str) -> None:
        """Something is wrong, and it goes on all the same."""
        self.tally.found(f"{self.plan.name}: {what}")

    # -- what happens

    def _run_to_the_end(self) -> None:
        while True:
            if self._restart_at is None:
                self.driving.poll(0.03)
            else:
                time.sleep(0.03)
            self._undo_what_is_over()
            self._let_faults_happen()
            if self._now() >= self._next_look:
                self._look()
                self._next_look = self._now() + _LOOK_SECONDS
            if self._restart_at is not None:
                if self._now() >= self._restart_at:
                    self._start_driver()
            elif self.driving.ended is not None and self._is_the_end(self.driving.ended):
                return
            if self._now() - max(self._fault_clock, self.host.disturbed) > HOME_SECONDS:
                raise StuckError(f"not home {HOME_SECONDS:.0f} s after the last fault: {brief(self.record())}")

    def _is_the_end(self, ended: Ended) -> bool:
        """Whether all is over; else another driver was or will be started."""
        reason, text = ended.error
        if ended is not self._noted:
            self._noted = ended
            self.tally.note("driver", plan=self.plan.name, uid=self.uid, ended=ended.short, events=ended.events)
        if reason == "JournalUnwritable":
            self._restart_at = self._now() + 1.0
            return False
        if reason:
            raise StuckError(f"its driver ended with {reason}: {text}")
        if ended.ending != Ending.INTERRUPTED:
            self._stored_before |= ended.report.reason == "AlreadyStored"
            self._outcome = self._outcome or str(ended.report.outcome or ended.ending)
            if self._undos or self._state is not Power.RUNNING or self._now() < self._off_until:
                return False
            if proof.is_home(self.subject):
                return self._second_has_ended()
            if self._retries > 20:
                raise StuckError(f"not home after {self._retries} retries: {ended}")
            self._bring_home(ended)
        self._start_driver()
        return False

    def _bring_home(self, ended: Ended) -> None:
        """It gave up, was released, or lost its journal: a human asks for a retry, or for another backup."""
        self._retries += 1
        time.sleep(0.5)
        if ended.ending == Ending.RELEASED or self._retries > 2:
            self.tally.count(self.tally.helped, "another backup brought the chain home")
            self.uid = str(uuid.uuid4())
            self.uids.append(self.uid)
            self._changes = {}
        else:
            self.tally.count(self.tally.helped, "retry asked for")
            self._changes = {**self._changes, "retry": f"by a human, {self._retries}"}

    def _second_has_ended(self) -> bool:
        if self._second is None:
            return True
        self._second.ask(stop=True)
        while self._second.ended is None:
            self._second.poll(1.0)
            if self._now() - max(self._fault_clock, self.host.disturbed) > HOME_SECONDS:
                raise StuckError("the second driver does not end")
        self._second = None
        return True

    def _let_faults_happen(self) -> None:
        moment = self.driving.moment
        if moment is not None and self._restart_at is None:
            for fault in [fault for fault in self._pending if fault.at == moment[0]]:
                self._happen(fault, moment[1])
            self.driving.let_go()
        for fault in list(self._pending):
            if fault.at is None and self._now() >= self._fault_clock + fault.delay and self.driving.ended is None:
                self._happen(fault, "")

    def _happen(self, fault: Fault, moment: str) -> None:
        self._pending.remove(fault)
        try:
            undo = FAULTS[fault.kind](self, fault)
        except NotNowError as why:
            self.tally.count(self.tally.idle, fault.kind)
            self.tally.note("nothing to happen to", plan=self.plan.name, fault=str(fault), moment=moment, why=str(why))
            return
        self._fault_clock = self._now()
        self._measure_from_now()
        self.tally.count(self.tally.faults, fault.kind + (f" and {fault.meanwhile}" if fault.meanwhile else ""))
        self.tally.note("fault", plan=self.plan.name, fault=str(fault), moment=moment)
        if undo is not None:
            self._undos.append((self._fault_clock + fault.seconds, undo))

    def _undo_what_is_over(self) -> None:
        for when, undo in list(self._undos):
            if self._now() >= when:
                self._undos.remove((when, undo))
                try:
                    undo()
                except NotNowError:
                    self._undos.append((self._now() + 1.0, undo))
                self._fault_clock = self._now()
                self._measure_from_now()

    # -- humans, who also watch how long the guest is suspended

    def _look(self) -> None:
        self.host.notice_crashes()
        state = self._state = self.host.state(self.subject.guest)
        record = self.record()
        self._measure(state, record)
        if state is Power.OFF:
            self._off_until = 0.0
            if self._now() >= self._may_start:
                self._start_guest()
        elif state is Power.IO_ERROR and not self._undos:
            self._io_error_since = self._io_error_since or self._now()
            if self._now() - self._io_error_since > _HUMAN_SECONDS:
                self._help("guest resumed after an I/O error", "resume")
                self._io_error_since = None
        elif state is Power.RUNNING:
            self._io_error_since = None
            self._hurry(record)
            self._restart_out_of_quarantine(record)

    def _hurry(self, record: Record | None) -> None:
        """A guest that writes as fast as its commit may merge: a human sees that it does not converge."""
        running = [disk for disk in record.disks if disk.commit_running] if record is not None else []
        begun = [disk.commit_started for disk in running if disk.commit_started is not None]
        limited = "bandwidth" in self.plan.spec["commit"] and "spec" not in self._changes
        if limited and begun and self.host.boottime() - min(begun) > _CONVERGING_SECONDS:
            self.tally.count(self.tally.helped, "a commit's limit of bandwidth lifted")
            self._changes["spec"] = {"copy": None, "commit": None}
            self.driving.ask(**self._changes)

    def _start_guest(self) -> None:
        try:
            self.host.virsh("start", self.subject.name)
            self._fault_clock = self._now()
        except RuntimeError as error:  # tried again
            if "Failed to get" in str(error) and self.host.libvirtd.kill_guests_that_libvirt_has_lost():
                self.tally.count(self.tally.helped, "QEMU ended that libvirt had lost")
        self._may_start = self._now() + 1.0

    def _restart_out_of_quarantine(self, record: Record | None) -> None:
        """Not where a fault changed an image: the user who did it puts it back."""
        why = record.quarantined if record is not None else ""
        if why in ("", *self._restarted) or any(fault.kind in HANDS_ON_IMAGES for fault in self.plan.faults):
            return
        self._restarted.add(why)
        self.tally.note("quarantine", plan=self.plan.name, why=why)
        self._help("guest restarted out of quarantine", "destroy")

    def _help(self, what: str, *command: str) -> None:
        self.tally.count(self.tally.helped, what)
        with suppress(RuntimeError):
            self.host.virsh(*command, self.subject.name)

    def _measure(self, state: Power | None, record: Record | None) -> None:
        ours = state is Power.PAUSED and record is not None and record.guard is Guard.OURS
        driven = self._restart_at is None and self.driving.ended is None and self.driving.moment is None
        if not (ours and driven):
            self._measure_from_now()
            return
        now = self._now()
        if self._suspended_since is None or self._suspended_since < self.host.disturbed:
            self._suspended_since = now
        self._in_doubt = self._in_doubt or record is None or record.call is not None
        suspended = now - self._suspended_since
        self.tally.stood_still(suspended, in_doubt=self._in_doubt)
        longest = SUSPENDED_SECONDS_IN_DOUBT if self._in_doubt else SUSPENDED_SECONDS
        if suspended > longest + STALL_PAUSE_SECONDS * (self.plan.spec["commit"].get("stallPolicy") == "Pause"):
            raise StuckError(f"the guest is suspended by us for {suspended:.1f} s: {brief(record)}")

    def _measure_from_now(self) -> None:
        self._suspended_since = None
        self._in_doubt = False

    # -- what must be true

    def _proven(self) -> None:
        undisturbed = self._disturbances == self.host.disturbances
        self.tally.checked(proof.prove_guest(self.subject))
        for uid in self.uids:
            bounds = proof.bounds_of(self.marks, self.subject, uid, certain=undisturbed)
            self.tally.checked(proof.prove_copy(self.subject, uid, bounds))
        self.tally.checked(proof.prove_tidy(self.subject, self.marks))

    def _delete(self) -> None:
        """All that this plan made goes; with its data, or without."""
        for uid in self.uids:
            if not (self.subject.state_dir / f"{uid}.journal").exists():
                continue
            self.uid = uid
            self._pending = []
            self._changes = {"deleted": True, "delete_data": self.plan.delete_data}
            self._start_driver()
            deadline = self._now() + HOME_SECONDS
            while self.driving.ended is None and self._now() < deadline:
                self.driving.poll(1.0)
            if self.driving.ended is None or self.driving.ended.ending != Ending.RELEASED:
                raise StuckError(f"deleted, and not released: {self.driving.ended}")
            self.tally.checked(
                proof.prove_deleted(self.subject, uid, data_too=self.plan.delete_data and not self._stored_before)
            )

    def abandon(self) -> None:
        """Something is wrong: keep what tells of it, and end what still runs."""
        for driving in (getattr(self, "driving", None), getattr(self, "_second", None)):
            if driving is not None:
                with suppress(Exception):
                    driving.show_stacks()
                    time.sleep(0.2)
                    driving.kill()
        for _, undo in getattr(self, "_undos", []):
            with suppress(Exception):
                undo()

    @staticmethod
    def _now() -> float:
        return time.monotonic()
