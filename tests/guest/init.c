/*
 * init.c - the only program of the Linux test guest: it writes memory, checks it, and says so.
 *
 * Kernel command line (the kernel hands words that it does not know to init's environment):
 *   fill=MIB      memory that is written over and over (64)
 *   pause=US      pause after each MiB, microseconds (0)
 *   readers=N     processes that read the disk /dev/vda with O_DIRECT for ever (0)
 *   stress=MIB    instead of all this do what `stress --vm 1 --vm-bytes MIB --vm-keep` does (0)
 *
 * Every half second the console gets a line
 *   tick N passes P reads R ok
 * and, as soon as memory or a sector does not hold what it should, a line that begins with
 * MISMATCH. Each pass checks what the pass before wrote. The disk holds, in each eight bytes, their
 * own offset times an odd constant, little endian; see `word`.
 *
 * With stress= it writes one byte of each page and checks them all, in turns; from the second turn on
 * the console gets, ten times a second, a line
 *   work N MiB at T ms
 * of what was written or checked since then, and the guest's own clock.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <linux/fs.h>

#define MIB (1u << 20)
#define PAGE 4096
#define WORDS (MIB / sizeof(uint64_t))

static _Atomic uint64_t *reads; /* shared with the readers; in MiB */

static uint64_t word(uint64_t offset, uint64_t pass)
{
    return (offset + pass) * 0x9e3779b97f4a7c15u;
}

static long number(const char *name, long otherwise)
{
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

static void load_modules(void)
{
    struct dirent **files;
    int count = scandir("/modules", &files, NULL, alphasort); /* names begin with their turn */
    for (int i = 0; i < count; i++) {
        char path[512];
        snprintf(path, sizeof path, "/modules/%s", files[i]->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (files[i]->d_name[0] != '.' && syscall(SYS_finit_module, fd, "", 0))
            perror(path);
        close(fd);
    }
}

/* One MiB of memory: checks what `pass - 1` wrote, then writes. */
static void turn_over(uint64_t *memory, uint64_t offset, uint64_t pass)
{
    for (size_t i = 0; i < WORDS; i++, offset += sizeof *memory) {
        uint64_t want = pass ? word(offset, pass - 1) : 0;
        if (memory[i] != want)
            printf("MISMATCH memory offset %#lx pass %lu: %#lx, not %#lx\n", offset, pass,
                   memory[i], want);
        memory[i] = word(offset, pass);
    }
}

static void read_disk(uint64_t seed)
{
    int fd = open("/dev/vda", O_RDONLY | O_DIRECT);
    uint64_t size = 0, *buffer = mmap(NULL, MIB, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) || size < MIB || buffer == MAP_FAILED) {
        printf("MISMATCH no disk of at least 1 MiB\n");
        _exit(1);
    }
    for (uint64_t turn = seed;; turn += 7) {
        uint64_t offset = turn % (size / MIB) * MIB;
        memset(buffer, 0xee, MIB);
        if (pread(fd, buffer, MIB, offset) != MIB)
            printf("MISMATCH disk offset %#lx: not read\n", offset);
        for (size_t i = 0; i < WORDS; i++) {
            uint64_t want = word(offset + i * sizeof *buffer, 0);
            if (buffer[i] != want) {
                printf("MISMATCH disk offset %#lx: %#lx, not %#lx\n",
                       offset + i * sizeof *buffer, buffer[i], want);
                break;
            }
        }
        atomic_fetch_add(reads, 1);
    }
}

static void tick(uint64_t pass)
{
    static uint64_t ticks, last;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t half_seconds = now.tv_sec * 2 + now.tv_nsec / 500000000;
    if (half_seconds == last)
        return;
    last = half_seconds;
    printf("tick %lu passes %lu reads %lu ok\n", ++ticks, pass, atomic_load(reads));
}

static uint64_t milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000ull + now.tv_nsec / 1000000;
}

/* One more MiB of work; says so when it is time. */
static void worked(void)
{
    static uint64_t work, last;
    uint64_t now = milliseconds();
    if (now / 100 != last / 100)
        printf("work %lu MiB at %lu ms\n", work, last = now);
    work++;
}

/* What stress 1.0 does: hogvm with --vm-keep, and its stride of a page. */
static void stress(volatile char *memory, uint64_t fill)
{
    for (uint64_t pass = 0;; pass++) {
        for (uint64_t offset = 0; offset < fill; offset += PAGE) {
            memory[offset] = 'Z';
            if (offset % MIB == 0 && pass > 0)
                worked();
        }
        for (uint64_t offset = 0; offset < fill; offset += PAGE) {
            if (memory[offset] != 'Z')
                printf("MISMATCH memory offset %#lx\n", offset);
            if (offset % MIB == 0 && pass > 0)
                worked();
        }
    }
}

int main(void)
{
    mkdir("/dev", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    setvbuf(stdout, NULL, _IOLBF, 0);
    load_modules();

    bool stressed = number("stress", 0) > 0;
    uint64_t fill = number(stressed ? "stress" : "fill", 64) * (uint64_t)MIB;
    long gap = number("pause", 0);
    char *memory = mmap(NULL, fill, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    reads = mmap(NULL, sizeof *reads, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || reads == MAP_FAILED) {
        printf("MISMATCH no memory for fill=%lu\n", fill / MIB);
        for (;;)
            pause(); /* init must not end */
    }
    if (stressed)
        stress(memory, fill);
    for (long i = number("readers", 0); i > 0; i--)
        if (fork() == 0)
            read_disk(i * 11);
    for (uint64_t pass = 0;; pass++)
        for (uint64_t offset = 0; offset < fill; offset += MIB) {
            turn_over((uint64_t *)(memory + offset), offset, pass);
            tick(pass);
            if (gap)
                usleep(gap); /* the pace at which memory is written */
        }
}
