"""Advice for a human, for what the agent cannot solve: which disk, which file, and what to do next. Pure."""

from __future__ import annotations

from vmbackup.protocol.record import DiskRecord, Record

_COLD_RESTART = "shut the guest down and start it again (a reboot from inside is not enough)"
# With the <backingStore> of another image QEMU would leave out what lies between; with its type it would not read it.
_EDIT = "virsh edit: its <source>, its format as type of the <driver>, and no <backingStore>"


def overlay_gone(disk: DiskRecord) -> str:
    """The guest is off, P=O, and there is no such file."""
    return (
        f"disk {disk.target}: the overlay {disk.overlay} is missing, and with it the guest's latest writes: put it "
        "back, or restore a backup"
    )


def images_differ(disk: DiskRecord) -> str:
    """Live, off in the middle of a pivot: the guest may have written to either."""
    return (
        f"disk {disk.target}: {disk.overlay} and {disk.base} differ after a power cut, and the guest may have "
        f"written to either: inspect copies of both, set the newer one in the domain's definition ({_EDIT}), and "
        "move the other away"
    )


def overlay_left_off(disk: DiskRecord) -> str:
    """The guest is off, P=B, and O is there."""
    return (
        f"disk {disk.target}: the guest is off and would start on {disk.base}, but {disk.overlay} may hold newer data: "
        "do not start it; compare them (qemu-img compare), set the newer one in the domain's definition "
        f"({_EDIT}), or move the overlay away"
    )


def gone_from_here(disk: DiskRecord) -> str:
    """Neither running nor defined here, and O is there: migrated, or undefined by hand, or transient and stopped."""
    return (
        f"disk {disk.target}: the domain is no longer on this host, and {disk.overlay} holds its guest's latest "
        "writes: keep that file. If the domain was migrated, the agent on that host merges it, and there is nothing to "
        f"do here; otherwise define the domain again with {disk.overlay} as its image (format qcow2, no "
        "<backingStore>), and start it"
    )


def overlay_left_on(disk: DiskRecord) -> str:
    """The guest is on, L=B, and O is there with content."""
    return (
        f"disk {disk.target}: the guest writes {disk.base}, but {disk.overlay} holds data that may be missing there: "
        "compare them, save what you need, and move the overlay away"
    )


def written_elsewhere(disk: DiskRecord, written: str) -> str:
    """T≠L. `written`: the file that QEMU writes."""
    return f"disk {disk.target}: QEMU writes {written}, libvirt names another image: {_COLD_RESTART}"


def written_to_foreign_image(disk: DiskRecord) -> str:
    """T≠L, and T is neither B nor O: somebody else's image, which the definition does not name."""
    return (
        f"disk {disk.target}: QEMU writes neither {disk.base} nor an image that libvirt names: the next start would "
        "boot an older image. Find it (virsh qemu-monitor-command DOMAIN --hmp 'info block'), set it in the domain's "
        f"definition ({_EDIT}), and only then shut the guest down and start it again"
    )


def overlay_in_use(disk: DiskRecord) -> str:
    """L=B, and O is locked."""
    return (
        f"disk {disk.target}: libvirt names {disk.base}, but {disk.overlay} is in use: end the process that has it "
        f"open (lsof shows it); if that is the guest's own QEMU, {_COLD_RESTART}"
    )


def job_unknown(disk: DiskRecord) -> str:
    """A `<mirror>` without a job, and L=O=T."""
    return (
        f"disk {disk.target}: libvirt still lists a commit of {disk.overlay} that QEMU no longer has: {_COLD_RESTART}"
    )


def foreign_image(disk: DiskRecord) -> str:
    """L is neither B nor O, and O is there."""
    return (
        f"disk {disk.target}: the guest uses another image than {disk.base} and {disk.overlay}, which may be below it: "
        "remove it (usually a snapshot: virsh blockcommit, virsh snapshot-delete); the backup then continues. If you "
        f"moved the guest there yourself (virsh blockcopy), move {disk.overlay} away once you do not need it"
    )


def base_changed(disk: DiskRecord) -> str:
    """B is no longer the file that it was when O was created on it."""
    return (
        f"disk {disk.target}: {disk.base} was replaced, removed or truncated, and {disk.overlay} only fits the "
        "original: nothing is merged. Put the original back under this name. If it is gone, do not stop the running "
        "guest, since QEMU may still have the file open: copy the disk to a new image (virsh blockcopy --pivot)"
    )


def written_astray(disk: DiskRecord, *, on_base: bool) -> str:
    """QEMU has opened B by its name while that led to another file, and uses that file now (a deleted one, say)."""
    save = (
        f"virsh blockcopy DOMAIN {disk.target} NEW-FILE --wait --pivot --transient-job; if a block job is running on "
        f"it, first virsh blockjob DOMAIN {disk.target} --abort"
    )
    kept = f"{disk.base} has the data up to the switch" if on_base else f"{disk.overlay} has what the guest wrote"
    return (
        f"disk {disk.target}: QEMU does not write the file {disk.base}, but one that had this name for a moment, and "
        f"that may be deleted already: something replaced {disk.base} during the backup (rsync, mv). Do not stop the "
        f"guest. Save what it sees now ({save}); {kept}. Compare the two, set the right one in the domain's definition "
        f"({_EDIT}), then move {disk.overlay} away"
    )


def holds_snapshot(disk: DiskRecord) -> str:
    """O holds an internal snapshot that a user has taken while the guest was on it."""
    return (
        f"disk {disk.target}: {disk.overlay} holds a snapshot that was taken during the backup, and would be deleted "
        "with it: nothing is merged. Delete the snapshot (virsh snapshot-list, virsh snapshot-delete), or save it "
        f"first (qemu-img convert -U -l NAME {disk.overlay} NEW-FILE)"
    )


def lost_by_libvirt(disk: DiskRecord) -> str:
    """Off, and yet O is open: libvirt 9.0 that is killed while it saves a job may not know the guest any more.

    It has then written a mirror without the kind of its job, which it cannot read at its next start.
    """
    return (
        f"disk {disk.target}: libvirt says that the guest is off, but a process has {disk.overlay} open (lsof). If "
        "that is its QEMU, which libvirt has lost, the guest is still running: shut it down from within, or "
        "end that process"
    )


def foreign_definition(disk: DiskRecord) -> str:
    """P is neither B nor O, and O is there."""
    return (
        f"disk {disk.target}: the domain's definition does not name {disk.base} (perhaps an image on top of "
        f"{disk.overlay}): change it back to {disk.base} ({_EDIT})"
    )


def foreign_job(disk: DiskRecord) -> str:
    """Somebody else's block job."""
    return (
        f"disk {disk.target}: another block job is running on {disk.overlay or 'it'}: wait until it ends, or end it "
        f"(virsh blockjob)"
    )


def foreign_commit(disk: DiskRecord) -> str:
    """Somebody else's commit writes to the base that is being copied."""
    return (
        f"disk {disk.target}: somebody else's commit of {disk.overlay} (virsh blockcommit) writes to {disk.base}, "
        "which therefore no longer matches the snapshot: create a new VMBackup"
    )


def start(*, saved: bool) -> str:
    """Off on O, and nothing else is wrong. `saved`: there is a saved state, which needs O."""
    return "start the guest: it is off on its overlay" + (", which its saved state needs" if saved else "")


def migrated(record: Record) -> str:
    """Off on O here, since it runs elsewhere."""
    return (
        f"domain {record.domain} was migrated to another host while it was on its overlay: the agent on that host "
        "merges it. Undefine the domain here (virsh undefine), or start it here only after it has ended there"
    )


def not_here(record: Record) -> str:
    """The domain was gone before the backup had begun."""
    return (
        f"domain {record.domain} is no longer on this host (usually migrated): create a new VMBackup with the "
        "spec.nodeName of the host where it runs"
    )


def migrating(record: Record) -> str:
    """Somebody else's job on the whole domain."""
    return (
        f"domain {record.domain} is being migrated, saved or backed up by somebody else: wait until it ends, or end it "
        f"(virsh domjobinfo {record.domain})"
    )


def stays_frozen(domain: str) -> str:
    """A lost backup left its guest frozen, and this one has given up thawing it."""
    return (
        f"domain {domain} was frozen by a backup whose journal is lost, and its guest agent does not answer: thaw it "
        f"by hand (virsh domfsthaw {domain}), or shut it down and start it, then create a new VMBackup"
    )


def image_changed(disk: DiskRecord) -> str:
    """Before the snapshot: L or P is not B any more."""
    return (
        f"disk {disk.target}: the guest uses another image than {disk.base}, or will at its next start: make the "
        "running guest and the domain's definition agree (virsh domblklist, --inactive too), then create a new VMBackup"
    )


def no_room(disks: list[DiskRecord]) -> str:
    """The guest was paused by an I/O error while these were on their overlay."""
    overlays = ", ".join(f"{disk.target}: {disk.overlay}" for disk in disks)
    return (
        f"the guest was paused by an I/O error, usually because its overlay has no room ({overlays}): the overlay is "
        "merged and the guest resumed; free space there, or set --overlay-dir, and create a new VMBackup"
    )


def commit_begun(disk: DiskRecord) -> str:
    """B is not the moment of the snapshot any more."""
    return (
        f"disk {disk.target}: the commit of {disk.overlay} into {disk.base} had begun before the copy was complete: "
        "create a new VMBackup"
    )


def disks_apart(disks: list[DiskRecord]) -> str:
    """R6. `disks`: those that are on base already."""
    names = ", ".join(f"{disk.target} ({disk.base})" for disk in disks)
    return f"the bases of some disks changed before their copy was complete: {names}; create a new VMBackup"


def commit_failed(disk: DiskRecord, why: str) -> str:
    """An attempt to merge an overlay has failed."""
    return (
        f"{disk.overlay} could not be merged into {disk.base}: {why}; check whether the file system of {disk.base} is "
        "full, or another process reads it (lsof)"
    )
