#!/bin/bash
# Builds and runs the tests of the C face: the header in every language version, then each test program under a time limit.
# TAP lines come first, the last line is "N passed, N failed, N skipped". What the engine lacks is skipped by name.
#
#   CARGO_TARGET_DIR  where cargo builds (default: target); the library is taken from its folder capi
#   CC, CXX           compilers (default: gcc, g++)
#   TIME_LIMIT        seconds for one program (default: 60)
#   ONLY              when not empty: only test programs whose name begins so
#   BUILD_ONLY        when not empty: builds the test programs in the folder tests-c, and runs nothing
set -u
cd "$(dirname "$0")/../.." || exit 1

target=${CARGO_TARGET_DIR:-target}
lib=$target/capi
out=$target/tests-c
cc=${CC:-gcc}
cxx=${CXX:-g++}
limit=${TIME_LIMIT:-60}
warnings=(-Wall -Wextra -Wpedantic -Wconversion -Wno-sign-conversion -Wshadow -Wstrict-prototypes -Werror)
# What a static Rust library needs (rustc --print native-static-libs).
static_needs=(-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc)
passed=0
failed=0
skipped=0

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

# compile NAME OUTPUT ARGUMENT...: quiet when all is well.
compile() {
	local name=$1 output=$2
	shift 2
	"$cc" -std=gnu11 -D_GNU_SOURCE -O1 -g "${warnings[@]}" -Iinclude -Itests/c -Iexamples/dmirror -o "$output" "$@" &&
		return 0
	report "$name compiles" 1
	return 1
}

# run NAME COMMAND...: counts the TAP lines of a program, which must end by itself and announce as many as it prints.
run() {
	local name=$1 output status lines planned skips
	shift
	[ -n "${BUILD_ONLY:-}" ] && return
	output=$(timeout --signal=KILL "$limit" "$@" 2>&1)
	status=$?
	echo "# $name"
	echo "$output"
	lines=$(grep -c -E '^(not )?ok ' <<<"$output")
	planned=$(sed -n 's/^1\.\.//p' <<<"$output")
	skips=$(grep -c '^ok .*# SKIP' <<<"$output")
	skipped=$((skipped + skips))
	passed=$((passed + $(grep -c '^ok ' <<<"$output") - skips))
	failed=$((failed + $(grep -c '^not ok ' <<<"$output")))
	if [ "$status" -gt 1 ] || [ "$lines" -ne "${planned:-0}" ]; then
		report "$name ran to its end (exit status $status, $lines of ${planned:-0} tests)" 1
	fi
}

# The header alone, in every version of C and C++, with and without its switches.
header_matrix() {
	local language std switch compiler extra
	# The one macro that declares something.
	local guarded='int guarded(struct mm_struct *mm, void *at);
		int guarded(struct mm_struct *mm, void *at) { HMM_GUARD_SCOPE(one); return hmm_guard(mm, &one, at, 1, true); }'
	for language in c:c99 c:c11 c:c17 c:c2x c++:c++11 c++:c++14 c++:c++17 c++:c++20; do
		std=${language#*:}
		language=${language%%:*}
		compiler=$cc
		extra=(-Wshadow -Wstrict-prototypes -Wc++-compat)
		[ "$language" = c++ ] && compiler=$cxx extra=()
		for switch in -DPLAIN -DHMM_API_4_17 -DHMM_API_7_3 -DHMM_NO_KERNEL_NAMES -DHMM_NO_STRUCT_DEVICE; do
			printf '%s\n' '#include <hmm.h>' "$guarded" | "$compiler" -x "$language" -std="$std" -Wall -Wextra -Wpedantic \
				-Wconversion -Werror "${extra[@]}" "$switch" -Iinclude -fsyntax-only -
			report "hmm.h alone, $std $switch" $?
		done
	done
}

# What must be true of the shared library itself: its name, that it stays loaded, and that it exports what the header
# declares, and nothing else.
binary_checks() {
	readelf -d "$lib/libhmm.so" | grep -q 'SONAME.*\[libhmm\.so\.0\.1\]'
	report "libhmm.so has its SONAME" $?
	readelf -d "$lib/libhmm.so" | grep -q 'NODELETE'
	report "libhmm.so stays loaded" $?
	nm -D --defined-only "$lib/libhmm.so" | awk '{ print $3 }' | sort >"$out/exported"
	local names='hmm_[a-z0-9_]+|migrate_(vma|device)[a-z0-9_]*|mmu_interval_[a-z_]+|mem(re|un)map_pages|page_pgmap'
	names+='|zone_device_page_init|make_device_exclusive(_range)?'
	grep -oE "^[a-z][a-z_ *0-9]*[ *]($names)\\(" include/hmm.h |
		grep -v '^static' | sed 's/.*[ *]\([a-z0-9_]*\)(/\1/' | sort >"$out/declared"
	diff "$out/declared" "$out/exported"
	report "libhmm.so exports what hmm.h declares" $?
}

# The kernel's cases, on the driver of examples/dmirror without its shim: as programs are, then with their changes of the
# layout announced, on each engine.
dmirror_cases() {
	local preload=$target/release/libhmm_preload.so source name object engine
	local ordered=(env LD_PRELOAD="$(realpath -m "$preload")" HMM_LAYOUT=ordered)
	mkdir -p "$out/dmirror"
	rm -f "$out"/dmirror/*.o
	for source in examples/dmirror/*.c; do
		object=$out/dmirror/$(basename "$source" .c).o
		[ "$source" = examples/dmirror/shim.c ] ||
			"$cc" -std=gnu11 -O1 -g -Wall -Wextra -Werror -Iinclude -c -o "$object" "$source" || {
			report "$source compiles" 1
			return
		}
	done
	if [ -z "${BUILD_ONLY:-}" ] && [ ! -e "$preload" ]; then
		cargo build --quiet --release --package hmm-preload || return
	fi
	for source in tests/c/dmirror/*.c; do
		name=dmirror/$(basename "$source" .c)
		case $name in "${ONLY:-}"*) ;; *) continue ;; esac
		compile "$name" "$out/$name" "$source" "$out"/dmirror/*.o "${shared[@]}" || continue
		run "$name, layout in order" "${ordered[@]}" "$out/$name"
		# On request (ONLY=dmirror/): as it is without announcements, and on each engine. What an engine cannot show fails.
		[ -n "${ONLY:-}" ] || continue
		run "$name" "$out/$name"
		for engine in uffd uffd-inline signal; do
			run "$name, layout in order, $engine" "${ordered[@]}" HMM_ENGINE=$engine "$out/$name"
		done
		run "$name, layout in order, without MOVE" \
			"${ordered[@]}" HMM_ENGINE=uffd HMM_UFFD_DISABLE=move "$out/$name"
	done
}

if [ ! -e "$lib/libhmm.so" ] || [ ! -e "$lib/libhmm.a" ]; then
	cargo build --quiet --profile capi --package hmm-capi || exit 1
fi
mkdir -p "$out"
ln -sfn libhmm.so "$lib/libhmm.so.0.1"
shared=(-L"$lib" -Wl,-rpath,"$(realpath "$lib")" -lhmm -pthread)

if [ -z "${BUILD_ONLY:-}" ]; then
	header_matrix
	binary_checks
fi
for source in tests/c/*.c; do
	name=$(basename "$source" .c)
	case $name in *_other_unit) continue ;; esac
	case $name in "${ONLY:-}"*) ;; *) continue ;; esac
	units=("$source")
	[ -e "tests/c/${name}_other_unit.c" ] && units+=("tests/c/${name}_other_unit.c")
	libraries=("${shared[@]}")
	[ "$name" = unload ] && libraries=("-DLIBHMM=\"$(realpath "$lib")/libhmm.so\"" -ldl)
	compile "$name" "$out/$name" "${units[@]}" "${libraries[@]}" || continue
	# The promises run on each engine: cargo xtask promises.
	case $name in promises*) [ -z "${ONLY:-}" ] && continue ;; esac
	run "$name" "$out/$name"
done
case ${ONLY:-} in "" | dmirror*) dmirror_cases ;; esac
if [ -z "${ONLY:-}" ]; then
	compile "migrate (static)" "$out/migrate-static" tests/c/migrate.c "$lib/libhmm.a" "${static_needs[@]}" &&
		run "migrate, linked with libhmm.a" "$out/migrate-static"
fi
if [ -n "${BUILD_ONLY:-}" ]; then
	exit $((failed > 0))
fi
compile "driver" "$out/driver" examples/c/driver.c "${shared[@]}" && timeout --signal=KILL "$limit" "$out/driver" >"$out/driver.txt"
report "examples/c/driver.c works" $?

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
