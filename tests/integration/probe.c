/* SPDX-License-Identifier: Apache-2.0
 * Makes system calls that a compartment should not get; prints "name errno" for each, 0 for success.
 * With an argument: takes as many inotify instances as it gets, prints their number and keeps them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/perf_event.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

static void tell(const char *name, long result)
{
	printf("%s %d\n", name, result < 0 ? errno : 0);
	fflush(stdout);
}

static void take_inotify(void)
{
	int count = 0;
	while (inotify_init() >= 0)
		count++;
	printf("inotify %d\n", count);
	fflush(stdout);
	pause();
}

int main(int count, char **arguments)
{
	static char buffer[4096];
	struct perf_event_attr event = {.type = PERF_TYPE_SOFTWARE, .size = sizeof event, .exclude_kernel = 1};
	union bpf_attr map = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
	struct linger linger = {1, 60};
	int one = 1, discipline = N_TTY;
	char letter = 'x';

	(void)arguments;
	if (count > 1)
		take_inotify();
	tell("add_key", syscall(SYS_add_key, "user", "probe", "secret", 6, -4));
	tell("request_key", syscall(SYS_request_key, "user", "probe", NULL, 0));
	tell("keyctl", syscall(SYS_keyctl, 0 /* KEYCTL_GET_KEYRING_ID */, -3, 0));
	tell("syslog", syscall(SYS_syslog, 10 /* SYSLOG_ACTION_SIZE_BUFFER */, NULL, 0));
	tell("bpf", syscall(SYS_bpf, BPF_MAP_CREATE, &map, sizeof map));
	tell("perf_event_open", syscall(SYS_perf_event_open, &event, 0, -1, -1, 0));
	tell("userfaultfd", syscall(SYS_userfaultfd, 1 /* UFFD_USER_MODE_ONLY */));
	memset(buffer, 0, sizeof buffer);
	tell("io_uring_setup", syscall(425, 1, buffer));
	tell("io_uring_enter", syscall(426, 0, 0, 0, 0, NULL, 0));
	tell("io_uring_register", syscall(427, 0, 0, NULL, 0));
	tell("open_by_handle_at", syscall(SYS_open_by_handle_at, AT_FDCWD, buffer, O_RDONLY));
	tell("AF_ALG", socket(38, SOCK_SEQPACKET, 0));
	tell("AF_VSOCK", socket(40, SOCK_STREAM, 0));
	tell("AF_PACKET", socket(17, SOCK_RAW, 0));
	/* The kernel looks at the low half of a register only; so must whoever filters. */
	tell("AF_VSOCK-high", syscall(SYS_socket, 40L | 1L << 32, SOCK_STREAM, 0));

	int terminal = posix_openpt(O_RDWR | O_NOCTTY);
	tell("TIOCSETD", ioctl(terminal, TIOCSETD, &discipline));
	tell("TIOCSTI", ioctl(terminal, TIOCSTI, &letter));
	tell("TIOCLINUX", ioctl(terminal, TIOCLINUX, &letter));
	tell("TIOCSETD-high", syscall(SYS_ioctl, terminal, TIOCSETD | 1L << 32, &discipline));

	int tcp = socket(AF_INET, SOCK_STREAM, 0);
	tell("SO_LINGER", setsockopt(tcp, SOL_SOCKET, SO_LINGER, &linger, sizeof linger));
	tell("SO_LINGER-high", syscall(SYS_setsockopt, tcp, SOL_SOCKET | 1L << 32, SO_LINGER, &linger, sizeof linger));
#ifdef __x86_64__
	tell("x32", syscall(0x40000000 | SYS_getpid));
	long result;
	__asm__ volatile("int $0x80" : "=a"(result) : "a"(20 /* getpid */) : "memory", "r8", "r9", "r10", "r11");
	errno = -result;
	tell("i386", result);
#endif
	/* These need no privilege, and fail only where the container is under the strict list. */
	tell("strict-unshare", syscall(SYS_unshare, 0));
	tell("strict-personality", syscall(SYS_personality, 0x0040000 /* ADDR_NO_RANDOMIZE */));
	tell("strict-get_mempolicy", syscall(SYS_get_mempolicy, NULL, NULL, 0, NULL, 0));
	tell("strict-process_vm_readv", syscall(SYS_process_vm_readv, getpid(), NULL, 0, NULL, 0, 0));
	tell("ok-personality", syscall(SYS_personality, 0xffffffff));
	/* What programs live by must go on working. */
	tell("ok-AF_UNIX", socket(AF_UNIX, SOCK_STREAM, 0));
	tell("ok-AF_INET", tcp);
	tell("ok-AF_INET6", socket(AF_INET6, SOCK_STREAM, 0));
	tell("ok-AF_NETLINK", socket(AF_NETLINK, SOCK_RAW, 0));
	tell("ok-SO_REUSEADDR", setsockopt(tcp, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
	/* TCP_CONGESTION has the number of SO_LINGER. */
	tell("ok-TCP_CONGESTION", setsockopt(tcp, 6 /* IPPROTO_TCP */, 13, "reno", 4));
	tell("ok-pty", terminal);
	tell("ok-TIOCGWINSZ", ioctl(terminal, TIOCGWINSZ, buffer));
	return 0;
}
