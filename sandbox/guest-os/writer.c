/*
 * The test guest's only work: on each disk a journal of numbered, checksummed records, each reported to the host over
 * the serial line once its fsync has returned, and never before.
 *
 *     writer RECORDS_PER_SECOND DIRTY_KIB_PER_SECOND DISK...      (each DISK is mounted on /mnt/DISK)
 *
 * On the serial line, one line each: "vda start 17" (the first number this boot will write), "vda 17" (acknowledged),
 * "vda failed WHY" (no more records for this disk).
 *
 * The disks are written in turn, the one that is behind first: at every moment the journal of an earlier disk is
 * level with that of a later one, or one record ahead. So a snapshot of all disks shows whether it was of one moment.
 *
 * An acknowledgement has left the guest before the next record is begun (tcdrain): what is on a disk is never more
 * than one record ahead of what the host has read.
 */
#define _GNU_SOURCE /* O_DIRECT */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define MAX_DISKS 16
#define BLOCK 4096
#define BLOCKS_AT_ONCE 16

/* One sector, so that no crash can tear it. sandbox/oracle.py reads the same layout. */
struct record {
	uint32_t magic;
	uint32_t crc; /* as zlib's crc32, of all that follows */
	uint64_t number; /* the first is 1; record n is at offset (n - 1) * sizeof(struct record) */
	uint64_t written_ms; /* since 1970 */
	uint64_t noise[61];
};
_Static_assert(sizeof(struct record) == 512, "a record is one sector");
static const uint32_t MAGIC = 0x4a424d56; /* "VMBJ" */

struct disk {
	const char *name;
	int fd; /* -1: failed */
	uint64_t next;
};

static int serial;
static uint32_t crc_table[256];
static uint64_t noise_state = 1;

static void crc_prepare(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t c = i;
		for (int bit = 0; bit < 8; bit++)
			c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
		crc_table[i] = c;
	}
}

static uint32_t crc32(const void *data, size_t size)
{
	const uint8_t *byte = data;
	uint32_t c = ~0u;
	while (size--)
		c = crc_table[(c ^ *byte++) & 0xff] ^ (c >> 8);
	return ~c;
}

/* xorshift64: never zero, so that no block of it becomes a hole. */
static void fill_with_noise(uint64_t *words, size_t count)
{
	while (count--) {
		noise_state ^= noise_state << 13;
		noise_state ^= noise_state >> 7;
		noise_state ^= noise_state << 17;
		*words++ = noise_state;
	}
}

static uint64_t milliseconds_now(void)
{
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void tell(const char *disk, const char *what)
{
	dprintf(serial, "%s %s\n", disk, what);
	tcdrain(serial);
}

static void fail(struct disk *disk, const char *doing)
{
	char line[200];
	snprintf(line, sizeof line, "failed %s: %s", doing, strerror(errno));
	tell(disk->name, line);
	disk->fd = -1;
}

static int is_intact(const struct record *record, uint64_t number)
{
	return record->magic == MAGIC && record->number == number &&
	       record->crc == crc32(&record->number, sizeof *record - offsetof(struct record, number));
}

/* Where this boot goes on: behind the last intact record. What comes there instead must be nothing at all. */
static void start(struct disk *disk)
{
	static const struct record nothing;
	struct record record;
	char path[64], line[64];

	snprintf(path, sizeof path, "/mnt/%s/journal", disk->name);
	disk->fd = open(path, O_RDWR | O_CREAT, 0644);
	if (disk->fd < 0)
		return fail(disk, "to open the journal");
	for (disk->next = 1; read(disk->fd, &record, sizeof record) == sizeof record; disk->next++) {
		if (is_intact(&record, disk->next))
			continue;
		if (memcmp(&record, &nothing, sizeof record) == 0)
			break;
		errno = EILSEQ;
		return fail(disk, "to read the journal");
	}
	snprintf(line, sizeof line, "start %llu", (unsigned long long)disk->next);
	tell(disk->name, line);
}

static void append(struct disk *disk)
{
	struct record record = { .magic = MAGIC, .number = disk->next, .written_ms = milliseconds_now() };
	char line[32];

	fill_with_noise(record.noise, sizeof record.noise / sizeof record.noise[0]);
	record.crc = crc32(&record.number, sizeof record - offsetof(struct record, number));
	if (pwrite(disk->fd, &record, sizeof record, (off_t)((disk->next - 1) * sizeof record)) != sizeof record)
		return fail(disk, "to write");
	if (fsync(disk->fd) != 0)
		return fail(disk, "to fsync");
	snprintf(line, sizeof line, "%llu", (unsigned long long)disk->next++);
	tell(disk->name, line);
}

/* The disk that is behind; of level ones the first. */
static struct disk *next_in_turn(struct disk *disks, int count)
{
	struct disk *turn = NULL;
	for (int i = 0; i < count; i++)
		if (disks[i].fd >= 0 && (!turn || disks[i].next < turn->next))
			turn = &disks[i];
	return turn;
}

/* Sleeps until `due` plus one period. Time lost (the guest was suspended) is not caught up. */
static void pace(struct timespec *due, double per_second)
{
	struct timespec now;
	int64_t wait_ns = (int64_t)(1e9 / per_second);

	clock_gettime(CLOCK_MONOTONIC, &now);
	if (due->tv_sec < now.tv_sec - 1)
		*due = now;
	wait_ns += due->tv_nsec;
	due->tv_sec += wait_ns / 1000000000;
	due->tv_nsec = wait_ns % 1000000000;
	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, due, NULL);
}

/* Overwrites /mnt/DISK/bulk at random places, for ever: each block carries its own checksum (first four bytes). */
static void keep_dirtying(char **names, int count, double kib_per_second)
{
	static uint32_t blocks[BLOCKS_AT_ONCE][BLOCK / 4] __attribute__((aligned(BLOCK)));
	int fds[MAX_DISKS];
	off_t chunks[MAX_DISKS];
	struct timespec due = { 0 };
	char path[64];

	for (int i = 0; i < count; i++) {
		snprintf(path, sizeof path, "/mnt/%s/bulk", names[i]);
		fds[i] = open(path, O_RDWR | O_DIRECT);
		chunks[i] = lseek(fds[i], 0, SEEK_END) / (off_t)sizeof blocks;
	}
	noise_state = milliseconds_now() | 1;
	for (int turn = 0;; turn = (turn + 1) % count) {
		fill_with_noise((uint64_t *)blocks, sizeof blocks / 8);
		for (int i = 0; i < BLOCKS_AT_ONCE; i++)
			blocks[i][0] = crc32(&blocks[i][1], BLOCK - 4);
		if (chunks[turn] > 0 && pwrite(fds[turn], blocks, sizeof blocks,
					       (off_t)(noise_state % chunks[turn]) * sizeof blocks) < 0)
			return tell(names[turn], "failed to dirty");
		pace(&due, kib_per_second * count * 1024 / sizeof blocks);
	}
}

int main(int argc, char **argv)
{
	struct disk disks[MAX_DISKS], *disk;
	int count = argc - 3;
	struct termios line;
	struct timespec due = { 0 };

	if (count < 1 || count > MAX_DISKS)
		return 2;
	serial = open("/dev/ttyS1", O_WRONLY | O_NOCTTY);
	if (tcgetattr(serial, &line) == 0) {
		cfmakeraw(&line);
		tcsetattr(serial, TCSANOW, &line);
	}
	crc_prepare();
	if (atof(argv[2]) > 0 && fork() == 0) {
		keep_dirtying(argv + 3, count, atof(argv[2]));
		return 1;
	}
	noise_state = milliseconds_now() | 1;
	for (int i = 0; i < count; i++) {
		disks[i].name = argv[3 + i];
		start(&disks[i]);
	}
	while ((disk = next_in_turn(disks, count))) {
		append(disk);
		pace(&due, atof(argv[1]) * count);
	}
	return 1;
}
