"""The command line on real libvirt: what it does, prints and exits with."""

from __future__ import annotations

import ctypes
import json
import os
import pty
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.libvirtd import DiskSpec, Libvirtd
from tests.support import manifests
from tests.support.backups import SLOW
from tests.support.domains import Domain, DomainFactory, qemu_img
from tests.support.stopwatch import Stopwatch
from vmbackup import cli
from vmbackup.commands.running import session
from vmbackup.imaging.locks import hold_reader_lock

VMBACKUP = (sys.executable, "-m", "vmbackup")
UID = re.compile(r"uid ([0-9a-f-]{36})")
NOWHERE = "qemu+unix:///session?socket=/nowhere"
AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"


class Cli:
    """`vmbackup` with the flags that a test's libvirtd, state and store need."""

    def __init__(self, libvirtd: Libvirtd, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.state = directory / "state"
        self.environment = {
            **os.environ,
            "VMBACKUP_LIBVIRT_URI": libvirtd.uri,
            "VMBACKUP_LIBVIRT_CONFIG_DIR": str(libvirtd.config_dir),
            "VMBACKUP_STATE_DIR": str(self.state),
        }
        self.started: list[subprocess.Popen[str]] = []

    def manifest(self, domain: str, *, name: str = "nightly", **changes: Any) -> str:
        """A file with a VMBackup, which needs no node, and its store."""
        backup = manifests.backup(name, domain=domain, nodeName=manifests.DROP, **changes)
        store = manifests.store("local", directory={"path": str(self.store)})
        file = self.directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump_all([backup, store]))
        return str(file)

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end; its exit code and output."""
        return subprocess.run(
            [*VMBACKUP, *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start it, to be told to stop or be killed."""
        process = subprocess.Popen(
            [*VMBACKUP, *arguments], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.started.append(process)
        return process

    @property
    def folders(self) -> list[Path]:
        """The complete backups in the store."""
        return [path.parent for path in self.store.glob("*/*/manifest.json") if not path.parent.name.startswith(".")]


@pytest.fixture
def vmbackup(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Cli]:
    made = Cli(libvirtd, tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], word: str) -> str:
    """Read its output up to the line that holds this word."""
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if word in line:
            return read
    raise AssertionError(f"it never said {word!r}: {read}")


def image_holds(image: Path | str, pattern: int, length: str = "1M") -> bool:
    command = ["qemu-io", "-r", "-f", "raw", "-c", f"read -P {pattern:#x} 0 {length}", str(image)]
    read = subprocess.run(command, capture_output=True, text=True, check=True)
    return "verification failed" not in read.stdout


def overlays_of(domain: Domain) -> list[Path]:
    return list(domain.directory.glob("*.vmb-*"))


# -- run


def test_a_backup_without_a_cluster_ends_ready_and_says_where_it_is(
    domain: DomainFactory, vmbackup: Cli, libvirtd: Libvirtd
) -> None:
    guest = domain({"vda": "raw", "vdb": "qcow2"})
    guest.write("vda", 0x11)
    before = libvirtd.virsh("domblklist", guest.name)
    done = vmbackup("run", "-f", vmbackup.manifest(guest.name))

    assert done.returncode == 0, done
    assert done.stderr == ""
    (folder,) = vmbackup.folders
    assert re.findall(r"  (Snapshotting|Copying|Committing|Ready) ", done.stdout) == [
        "Snapshotting", "Copying", "Committing", "Ready",
    ]  # fmt: skip
    assert f"stored at {folder}, and every disk is home" in done.stdout
    assert libvirtd.virsh("domblklist", guest.name) == before
    assert not overlays_of(guest)
    assert qemu_img("compare", str(folder / "vda.raw"), guest.bases["vda"]).startswith("Images are identical")
    digest = json.loads((folder / "manifest.json").read_text())["disks"][0]["digest"]
    assert digest in done.stdout


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"disks": ["vdz"]}, "spec.disks names 'vdz': the domain has vda"),
        ({"domain": "nobody"}, "domain 'nobody' is not defined on this hypervisor"),
        ({"snapshot.quiesce": "Require"}, "add the channel org.qemu.guest_agent.0"),
    ],
    ids=["no such disk", "no such domain", "no guest agent"],
)
def test_what_is_refused_is_left_untouched(
    domain: DomainFactory, vmbackup: Cli, libvirtd: Libvirtd, changes: dict[str, Any], says: str
) -> None:
    guest = domain()
    libvirtd.virsh("resume", guest.name)  # a paused guest could not be frozen anyway
    done = vmbackup("run", "-f", vmbackup.manifest(**{"domain": guest.name} | changes))
    assert done.returncode == 2
    assert says in done.stdout.splitlines()[-1]
    assert guest.live().source == guest.bases["vda"]
    assert not vmbackup.folders


def test_a_guest_that_is_off_is_refused(domain: DomainFactory, vmbackup: Cli) -> None:
    done = vmbackup("run", "-f", vmbackup.manifest(domain(start=False).name))
    assert done.returncode == 2
    assert "Refused       DomainNotRunning: domain" in done.stdout


def test_a_failed_copy_brings_the_guest_home_and_exits_1(domain: DomainFactory, vmbackup: Cli) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="16M")
    file = vmbackup.manifest(guest.name, **{"copy.bandwidth": SLOW, "copy.deadlineSeconds": 1})
    done = vmbackup("run", "-f", file)
    assert done.returncode == 1, done
    assert "Failed        CopyDeadlineExceeded: " in done.stdout
    assert "every disk is home" in done.stdout.splitlines()[-1]
    assert guest.live().source == guest.bases["vda"]
    assert not overlays_of(guest)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_ended_run_is_carried_on_by_the_next(domain: DomainFactory, vmbackup: Cli, end: signal.Signals) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="32M")
    first = vmbackup.start("run", "-f", vmbackup.manifest(guest.name, **{"copy.bandwidth": SLOW}))
    said = read_until(first, "Copying")
    first.send_signal(end)
    rest, _ = first.communicate(timeout=60)
    if end is signal.SIGKILL:
        assert first.returncode == -signal.SIGKILL
    else:
        assert first.returncode == 130, rest
        assert "Interrupted   the guest runs on its overlay; run again to continue" in rest
    guest.write("vda", 0x22)
    assert guest.live().source != guest.bases["vda"]

    again = vmbackup("run", "-f", vmbackup.manifest(guest.name))
    assert again.returncode == 0, again
    assert UID.findall(again.stdout) == UID.findall(said)
    assert "Continuing    default/nightly" in again.stdout
    (folder,) = vmbackup.folders
    assert image_holds(folder / "vda.raw", 0x11, "32M"), "the copy is not of the moment of the first run's snapshot"
    assert guest.holds("vda", 0x22)
    assert guest.live().source == guest.bases["vda"]


def test_a_signal_that_the_kernel_gives_to_any_of_its_threads_interrupts_it(
    domain: DomainFactory, vmbackup: Cli
) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="32M")
    process = vmbackup.start("run", "-f", vmbackup.manifest(guest.name, **{"copy.bandwidth": SLOW}))
    read_until(process, "Copying")
    newest = max(int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir())
    assert newest != process.pid
    assert ctypes.CDLL(None).tgkill(process.pid, newest, signal.SIGINT) == 0
    process.communicate(timeout=20)  # the copy takes 32 s
    assert process.returncode == 130
    assert vmbackup("run", "-f", vmbackup.manifest(guest.name)).returncode == 0


def test_the_second_ctrl_c_ends_it_at_once_even_with_a_libvirtd_that_does_not_answer(
    domain: DomainFactory, vmbackup: Cli, libvirtd: Libvirtd
) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="32M")
    process = vmbackup.start("run", "-f", vmbackup.manifest(guest.name, **{"copy.bandwidth": SLOW}))
    read_until(process, "Copying")
    libvirtd.stop_signal()
    try:
        process.send_signal(signal.SIGINT)
        read_until(process, "Stopping")
        process.send_signal(signal.SIGINT)
        watch = Stopwatch()
        assert process.wait(timeout=60) == 130
        assert watch.within(3), watch
    finally:
        libvirtd.cont()
    assert vmbackup("run", "-f", vmbackup.manifest(guest.name)).returncode == 0


def test_the_same_backup_started_twice_is_taken_once(domain: DomainFactory, vmbackup: Cli) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="32M")
    file = vmbackup.manifest(guest.name, **{"copy.bandwidth": "4Mi"})
    first = vmbackup.start("run", "-f", file)
    said = read_until(first, "Copying")
    second = vmbackup("run", "-f", file)
    rest, _ = first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), rest + second.stdout
    assert UID.findall(second.stdout) == UID.findall(said)
    assert "another process is already running this backup" in second.stdout
    assert len(vmbackup.folders) == 1


def test_a_manifest_that_is_run_again_takes_another_backup_and_leaves_one_journal(
    domain: DomainFactory, vmbackup: Cli
) -> None:
    file = vmbackup.manifest(domain().name)
    uids = [uid for _ in range(2) for uid in UID.findall(vmbackup("run", "-f", file).stdout)]
    assert len(set(uids)) == len(vmbackup.folders) == 2
    assert [path.stem for path in vmbackup.state.iterdir()] == [uids[-1]]


def test_another_backup_of_the_same_domain_waits_for_the_first(domain: DomainFactory, vmbackup: Cli) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="32M")
    first = vmbackup.start("run", "-f", vmbackup.manifest(guest.name, name="first", **{"copy.bandwidth": "4Mi"}))
    read_until(first, "Copying")
    second = vmbackup.start("run", "-f", vmbackup.manifest(guest.name, name="second"))
    read_until(second, "another backup of this domain is running")
    assert guest.live().source != guest.bases["vda"]
    assert first.wait(timeout=60) == 0
    assert second.wait(timeout=60) == 0
    assert len(vmbackup.folders) == 2
    assert not overlays_of(guest)


def test_a_guest_that_cannot_come_home_exits_3_and_comes_home_on_retry(domain: DomainFactory, vmbackup: Cli) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="32M")
    file = vmbackup.manifest(guest.name, **{"copy.bandwidth": "4Mi", "commit.backoffLimit": 0})
    process = vmbackup.start("run", "-f", file)
    said = read_until(process, "Copying")
    with Path(guest.bases["vda"]).open("rb") as reader:
        hold_reader_lock(reader.fileno())  # as a reader that never ends: QEMU cannot write the base
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 3, rest
    assert "Failed        CommitLimitReached: the guest runs on its overlay and lost nothing" in rest
    assert "fix the cause, then run again with --retry" in rest
    assert "annotation" not in rest

    again = vmbackup("run", "--retry", "-f", file)
    assert again.returncode == 0, again
    assert UID.findall(again.stdout) == UID.findall(said)
    assert not overlays_of(guest)
    nothing_left = vmbackup("run", "--retry", "-f", file)
    assert nothing_left.returncode == 2
    assert "leave out --retry" in nothing_left.stderr


def test_a_guest_that_stays_off_on_its_overlay_exits_3(
    domain: DomainFactory,
    vmbackup: Cli,
    libvirtd: Libvirtd,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="32M")
    file = vmbackup.manifest(guest.name, **{"copy.bandwidth": "4Mi"})
    process = vmbackup.start("run", "-f", file)
    read_until(process, "Copying")
    process.kill()
    libvirtd.virsh("destroy", guest.name)

    monkeypatch.setattr(session, "_OFF_GRACE", 0.1)
    for name, value in vmbackup.environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["run", "-f", file]) == 3
    said = capfd.readouterr().out
    assert "the guest is off on its overlay (disk vda: " in said
    assert "the commit continues when it starts; start the guest, then run again" in said
    libvirtd.virsh("start", guest.name, "--paused")
    assert vmbackup("run", "-f", file).returncode == 0
    assert guest.live().source == guest.bases["vda"]


def test_on_a_terminal_there_is_a_progress_bar(domain: DomainFactory, vmbackup: Cli) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="32M")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*VMBACKUP, "run", "-f", vmbackup.manifest(guest.name, **{"copy.bandwidth": "4Mi"})],
        env=vmbackup.environment | {"TERM": "xterm", "COLUMNS": "120"},
        stdout=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # EIO: the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=60) == 0
    assert "━".encode() in shown
    assert b" of 64.0 MiB" in shown
    assert b"stored at" in shown
    assert shown.endswith(b"\x1b[2K"), "the bar is gone"


# -- check


def test_check_shows_what_would_be_backed_up_and_what_not_and_changes_nothing(
    domain: DomainFactory, vmbackup: Cli, tmp_path: Path
) -> None:
    cdrom = DiskSpec("sda", tmp_path / "empty.iso", device="cdrom", bus="sata", inner="<readonly/>")
    Path(cdrom.path).touch()
    guest = domain({"vda": "raw", "vdb": "chain"}, more_disks=(cdrom,), devices=AGENT)
    files = sorted(guest.directory.iterdir())
    done = vmbackup("check", guest.name)
    assert done.returncode == 0, done
    words = {line.split()[-1 if "0x" in line else 0]: line for line in done.stdout.splitlines()}
    assert "backed up" in words[guest.name]
    assert re.search(r"vdb .*vdb.qcow2 .*backed up: with its 1 backing images", done.stdout)
    assert re.search(r"sda .*left out: is a cdrom", done.stdout)
    assert "its guest agent is not connected" in done.stdout
    assert sorted(guest.directory.iterdir()) == files
    assert not vmbackup.state.exists()


def test_check_says_why_a_domain_would_be_refused(domain: DomainFactory, vmbackup: Cli, libvirtd: Libvirtd) -> None:
    guest = domain()
    shares = DiskSpec("vdb", guest.bases["vda"], inner="<shareable/>")
    other = domain(more_disks=(shares,), start=False)
    done = vmbackup("check", "-o", "json", guest.name)
    assert done.returncode == 1
    (found,) = json.loads(done.stdout)["domains"]
    assert found["refused"][0]["reason"] == "BaseInUse"
    assert f"is also used by disk vdb of domain {other.name}" in found["refused"][0]["message"]
    assert found["disks"][0]["verdict"] == "Refused"
    everything = vmbackup("check")
    assert everything.returncode == 1
    assert f"refused {other.name}: domain {other.name} is not running" in everything.stdout
    assert f"refused {guest.name}: disk vda: " in everything.stdout


def test_check_tells_of_overlays_and_whose_they_are(domain: DomainFactory, vmbackup: Cli) -> None:
    guest = domain({"vda": "raw", "vdb": "raw"})
    stray = guest.directory / "vdb.vmb-89abcdef-vdb.qcow2"
    guest.write("vda", 0x11, length="32M")
    process = vmbackup.start("run", "-f", vmbackup.manifest(guest.name, disks=["vda"], **{"copy.bandwidth": SLOW}))
    read_until(process, "Copying")
    process.kill()
    process.wait()
    stray.touch()
    done = vmbackup("check", guest.name)
    assert re.search(r"vda .*vda\.vmb-[0-9a-f]{8}-vda\.qcow2 .*on overlay", done.stdout)
    assert (
        "vda: overlays of the backup default/nightly: it is still running, or continues when it is run again"
        in done.stdout
    )
    assert f"vdb: {stray} is named like one of vmbackup's overlays, but nothing uses it" in done.stdout

    unknown = vmbackup("check", guest.name, VMBACKUP_STATE_DIR=str(vmbackup.directory / "elsewhere"))
    assert "vda: overlays without a journal on this host: the next backup merges them first" in unknown.stdout
    assert vmbackup("run", "-f", vmbackup.manifest(guest.name, disks=["vda"])).returncode == 0


def test_check_tells_what_a_transient_domain_and_a_missing_configuration_mean(
    domain: DomainFactory, vmbackup: Cli, tmp_path: Path
) -> None:
    assert (
        "transient: a power cut during a backup is not covered"
        in vmbackup("check", domain(persistent=False).name).stdout
    )
    persistent = domain()
    done = vmbackup("check", persistent.name, "--libvirt-config-dir", str(tmp_path))
    assert done.returncode == 0
    assert f"{tmp_path / persistent.name}.xml cannot be read" in done.stdout


# -- flags, files and errors


def test_a_flag_counts_more_than_its_variable(domain: DomainFactory, vmbackup: Cli) -> None:
    guest = domain()
    other = vmbackup.directory / "other"
    done = vmbackup("run", "-f", vmbackup.manifest(guest.name), "--state-dir", str(other))
    assert done.returncode == 0, done
    assert list(other.glob("*.journal"))
    assert not vmbackup.state.exists()


def test_the_file_may_be_a_variable_and_the_store_a_path(domain: DomainFactory, vmbackup: Cli, tmp_path: Path) -> None:
    guest = domain()
    manifest = tmp_path / "only.yaml"
    manifest.write_text(yaml.safe_dump(manifests.backup("only", domain=guest.name, storeRef=manifests.DROP)))
    done = vmbackup("run", VMBACKUP_FILE=str(manifest), VMBACKUP_STORE_PATH=str(tmp_path / "there"))
    assert done.returncode == 0, done
    assert list((tmp_path / "there").glob("default/only.*/manifest.json"))


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("VMBACKUP_METRICS_PORT", "none", "VMBACKUP_METRICS_PORT is 'none': must be a port from 1 to 65535"),
        ("VMBACKUP_MAX_CONCURRENT_BACKUPS", "0", "must be a whole number, 1 or more"),
        ("VMBACKUP_COMMIT_BACKOFF", "-1", "must be a number of seconds above 0"),
        ("VMBACKUP_NODE_NAME", "Node_A", "like spec.nodeName"),
        ("VMBACKUP_LOG_LEVEL", "loud", "must be one of debug, info, warning, error"),
    ],
)
def test_a_bad_value_is_named_with_its_cure(vmbackup: Cli, variable: str, value: str, says: str) -> None:
    by_variable = vmbackup("agent", **{variable: value})
    assert by_variable.returncode == 2
    assert variable in by_variable.stderr.splitlines()[-1]
    assert says in by_variable.stderr
    flag = "--" + variable.removeprefix("VMBACKUP_").lower().replace("_", "-")
    by_flag = vmbackup("agent", f"{flag}={value}")
    assert by_flag.returncode == 2
    assert flag in by_flag.stderr.splitlines()[-1]
    assert variable not in by_flag.stderr


@pytest.mark.parametrize("command", ["agent", "run", "check"])
def test_help_shows_the_variable_of_each_flag(vmbackup: Cli, command: str) -> None:
    shown = vmbackup(command, "--help", COLUMNS="200").stdout
    names = set(re.findall(r"^ +(?:-\w \w+, )?--([a-z-]+)", shown, re.MULTILINE)) - {"help"}
    variables = set(re.findall(r"\[VMBACKUP_([A-Z_]+)", shown))
    assert variables == {name.upper().replace("-", "_") for name in names}
    assert "STATE_DIR" in variables


def test_run_and_check_start_without_the_client_of_kubernetes(vmbackup: Cli) -> None:
    code = (
        "import sys; from vmbackup import cli; from vmbackup.commands import run, check;"
        "print(sorted({'kopf', 'kubernetes', 'aiohttp'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_state_directory_that_cannot_be_written_is_one_line_on_stderr(domain: DomainFactory, vmbackup: Cli) -> None:
    guest = domain()
    (vmbackup.directory / "file").touch()
    state = vmbackup.directory / "file" / "state"
    done = vmbackup("run", "-f", vmbackup.manifest(guest.name), "--state-dir", str(state))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "choose another --state-dir; nothing was touched" in line
    assert guest.live().source == guest.bases["vda"]


def test_an_unreadable_journal_is_set_aside_and_the_backup_starts_over(domain: DomainFactory, vmbackup: Cli) -> None:
    uid, file = journal_of("garbled\n", domain(), vmbackup)
    done = vmbackup("run", "-f", str(file))
    assert done.returncode == 0
    assert f"kept as {vmbackup.state / uid}.journal.garbled" in done.stdout.replace("\n", "")


def test_a_journal_of_another_version_is_one_line_on_stderr(domain: DomainFactory, vmbackup: Cli) -> None:
    text = '{"uid": "", "namespace": "", "name": "", "copy": "of-the-future"}'
    _, file = journal_of(f"{zlib.crc32(text.encode()):08x} {text}\n", domain(), vmbackup)
    done = vmbackup("run", "-f", str(file))
    assert done.returncode == 3, "who knows where the guest is"
    (line,) = done.stderr.splitlines()
    assert "is of another version" in line
    assert "use the vmbackup that wrote it" in line


def journal_of(content: str, guest: Domain, vmbackup: Cli) -> tuple[str, Path]:
    """Put a journal there; the uid of its backup, and the manifest."""
    uid = "5a9c4a3e-3d55-4c39-bd2c-5d9c6b1b51a1"
    vmbackup.state.mkdir()
    (vmbackup.state / f"{uid}.journal").write_text(content)
    file = Path(vmbackup.manifest(guest.name))
    file.write_text(file.read_text().replace("metadata:", f"metadata:\n  uid: {uid}", 1))
    return uid, file


@pytest.mark.parametrize("command", ["check", "run"])
def test_no_libvirtd_is_one_line_and_not_a_wait(vmbackup: Cli, command: str) -> None:
    arguments = ["-f", vmbackup.manifest("web-01")] if command == "run" else []
    done = vmbackup(command, *arguments, VMBACKUP_LIBVIRT_URI=NOWHERE, VMBACKUP_LOG_LEVEL="error")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"no libvirtd answers at {NOWHERE}" in line


def test_an_unfinished_backup_is_told_of_and_not_mistaken_for_another(domain: DomainFactory, vmbackup: Cli) -> None:
    guest, other = domain(), domain()
    guest.write("vda", 0x11, length="32M")
    file = vmbackup.manifest(guest.name, **{"copy.bandwidth": SLOW})
    process = vmbackup.start("run", "-f", file)
    read_until(process, "Copying")
    process.kill()
    process.wait()
    done = vmbackup("run", "-f", vmbackup.manifest(other.name))
    assert done.returncode == 2
    assert f"exists for the domain {guest.name}: finish that one first" in done.stderr
    away = vmbackup("run", "-f", vmbackup.manifest(guest.name), VMBACKUP_LIBVIRT_URI=NOWHERE)
    assert away.returncode == 3
    assert "the guest may be on its overlay" in away.stderr
    assert vmbackup("run", "-f", vmbackup.manifest(guest.name)).returncode == 0
