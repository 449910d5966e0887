#!/bin/bash
# Builds libhmm_preload.so and runs its tests: C programs that pretend to be libhmm, and ordinary programs that do not
# know of it. TAP lines come first, the last line is "N passed, N failed".
#
#   CARGO_TARGET_DIR  where cargo builds (default: target); the library is taken from its folder release, libhmm from
#                     capi
#   CC                compiler (default: gcc)
#   TIME_LIMIT        seconds for one program (default: 60)
set -u
cd "$(dirname "$0")/../.." || exit 1

target=${CARGO_TARGET_DIR:-target}
capi=$target/capi
out=$target/tests-preload
cc=${CC:-gcc}
limit=${TIME_LIMIT:-60}
warnings=(-Wall -Wextra -Wpedantic -Wconversion -Wno-sign-conversion -Wshadow -Wstrict-prototypes -Werror)
passed=0
failed=0

# report NAME STATUS: one TAP line for a test of this script.
report() {
	if [ "$2" -eq 0 ]; then
		passed=$((passed + 1))
		echo "ok - $1"
	else
		failed=$((failed + 1))
		echo "not ok - $1"
	fi
}

# compile NAME ARGUMENT...: quiet when all is well.
compile() {
	local name=$1
	shift
	"$cc" -std=gnu11 -D_GNU_SOURCE -g "${warnings[@]}" -o "$out/$name" "tests/preload/$name.c" -pthread "$@" && return 0
	report "$name compiles" 1
	return 1
}

# preloaded COMMAND...: runs it with the library, under a time limit.
preloaded() {
	timeout --signal=KILL "$limit" env LD_PRELOAD="$lib" "$@"
}

# run NAME: counts the TAP lines of a program, which must end by itself and announce as many as it prints.
run() {
	local name=$1 output status lines planned
	output=$(preloaded "$out/$name" 2>&1)
	status=$?
	echo "# $name"
	echo "$output"
	lines=$(grep -c -E '^(not )?ok ' <<<"$output")
	planned=$(sed -n 's/^1\.\.\([0-9]*\).*/\1/p' <<<"$output")
	passed=$((passed + $(grep -c '^ok ' <<<"$output")))
	failed=$((failed + $(grep -c '^not ok ' <<<"$output")))
	if [ "$status" -gt 1 ] || [ "$lines" -ne "${planned:-0}" ]; then
		report "$name ran to its end (exit status $status, $lines of ${planned:-0} tests)" 1
	fi
}

# What the library replaces; each name is either here or not replaced.
replaced() {
	printf '%s\n' hmm_preload_attach hmm_preload_attach_layout \
		read __read write __write pread pread64 __pread64 pwrite pwrite64 __pwrite64 \
		readv writev preadv preadv64 pwritev pwritev64 preadv2 preadv64v2 pwritev2 pwritev64v2 \
		send __send recv sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg \
		__read_chk __pread_chk __pread64_chk __recv_chk __recvfrom_chk \
		sigaction __sigaction signal bsd_signal ssignal sysv_signal __sysv_signal \
		pthread_sigmask sigprocmask sigsuspend \
		mmap mmap64 munmap mremap mprotect pkey_mprotect madvise brk sbrk shmdt | sort
}

binary_checks() {
	nm -D --defined-only "$lib" | awk '{ print $3 }' | sort | diff <(replaced) -
	report "the library replaces what it says, and nothing else" $?
	readelf -d "$lib" | grep -q 'NODELETE'
	report "the library stays loaded" $?
	! nm -D --undefined-only "$lib" | grep -q hmm
	report "the library needs nothing of libhmm" $?
}

# Programs that know nothing of it do what they always do.
ordinary_programs() {
	local input=README.md
	preloaded cat "$input" | cmp - "$input"
	report "cat" $?
	preloaded dd if="$input" of="$out/copy" bs=7 status=none && cmp "$out/copy" "$input"
	report "dd" $?
	preloaded bash -c 'trap "echo caught" USR1; kill -USR1 $$; seq 1000 | sort -rn | tail -n 1' |
		diff - <(printf 'caught\n1\n')
	report "bash, with pipes, children and signals" $?
	if command -v python3 >/dev/null; then
		preloaded python3 - <<-'EOF'
			import os, signal, socket, subprocess, threading
			one, other = socket.socketpair()
			sender = threading.Thread(target=one.sendall, args=(b"x" * 1_000_000,))
			sender.start()
			assert len(other.recv(1_000_000, socket.MSG_WAITALL)) == 1_000_000
			sender.join()
			one.sendmsg([b"a", b"b"])
			assert other.recvmsg(10)[0] == b"ab"
			signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV, signal.SIGUSR1})
			assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGSEGV, signal.SIGUSR1}
			assert subprocess.run(["cat"], input=b"through", capture_output=True).stdout == b"through"
		EOF
		report "python3" $?
	fi
}

# Constructors of libraries behind it run before its own.
early_calls() {
	"$cc" -std=gnu11 -D_GNU_SOURCE -g "${warnings[@]}" -shared -fPIC -o "$out/early.so" tests/preload/early.c &&
		timeout --signal=KILL "$limit" env LD_PRELOAD="$lib:$out/early.so" /bin/true | diff - <(echo early)
	report "calls before the library is ready" $?
}

# The real libhmm on every engine of this machine.
with_libhmm() {
	local engine
	if [ ! -e "$capi/libhmm.so" ]; then
		cargo build --quiet --profile capi --package hmm-capi || return
	fi
	ln -sfn libhmm.so "$capi/libhmm.so.0.1"
	for name in libhmm layout lost storm; do
		compile "$name" -O1 -Iinclude -L"$capi" -Wl,-rpath,"$(realpath "$capi")" -lhmm || return
	done
	for engine in uffd uffd-inline signal; do
		echo "# engine $engine"
		HMM_ENGINE=$engine run libhmm
		for name in layout lost storm; do
			HMM_ENGINE=$engine HMM_LAYOUT=ordered run "$name"
		done
	done
	for engine in uffd uffd-inline; do
		echo "# engine $engine without MOVE"
		HMM_UFFD_DISABLE=move HMM_ENGINE=$engine HMM_LAYOUT=ordered run layout
		HMM_UFFD_DISABLE=move HMM_ENGINE=$engine HMM_LAYOUT=ordered run storm
	done
	layout_modes
}

# Who gets which mode. An engine that is refused here says why.
layout_modes() {
	HMM_ENGINE=signal preloaded "$out/layout" mode | grep -qx ordered
	report "an engine that nobody tells of changes has them announced" $?
	HMM_ENGINE=signal HMM_LAYOUT=observed preloaded "$out/layout" mode | grep -qx observed
	report "unless they are to be observed" $?
	HMM_ENGINE=uffd preloaded "$out/layout" mode | grep -qE '^observed$|userfaultfd'
	report "an engine with events observes by itself" $?
	HMM_LAYOUT=ordered timeout --signal=KILL "$limit" "$out/layout" mode | grep -q 'needs libhmm_preload.so'
	report "announcements without the library are refused with a reason" $?
	HMM_LAYOUT=sideways preloaded "$out/layout" mode | grep -q 'HMM_LAYOUT=sideways: unknown'
	report "modes that do not exist are refused" $?
}

# Nanoseconds of one read, without the library, with it, and with it attached.
cost() {
	local plain loaded attached
	plain=$(timeout --signal=KILL "$limit" "$out/cost") && loaded=$(preloaded "$out/cost") &&
		attached=$(preloaded "$out/cost" attached)
	report "the cost can be measured" $?
	awk -v plain="$plain" -v loaded="$loaded" -v attached="$attached" 'BEGIN {
		printf "# read of 1 byte: %s ns without the library; with it %s ns (%.2f times)", plain, loaded, loaded / plain
		printf "; attached, beside what libhmm does, %s ns (%.2f times)\n", attached, attached / plain
	}'
}

cargo build --quiet --release --package hmm-preload || exit 1
lib=$(realpath "$target/release/libhmm_preload.so") || exit 1
mkdir -p "$out"

binary_checks
ordinary_programs
early_calls
for name in calls messages loss signals threads announce; do
	compile "$name" -O1 && run "$name"
done
compile fortified -O2 -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 && run fortified
compile cost -O2 && cost
with_libhmm

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
