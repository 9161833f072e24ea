# orcd: `make run` runs the bundled model, `make test` runs every test, `make lint` checks floors, format and sizes,
# `make install` installs below PREFIX (/usr/local).
# Options: SAN=1 (address and undefined-behaviour sanitizers), SAN=thread, CUDA=0 (leave the GPU backend out), V=1.

.DEFAULT_GOAL := all
SHELL := /bin/bash
MAKEFLAGS += --no-builtin-rules

CC ?= cc
ifeq ($(origin CC),default)
CC := gcc
endif
NVCC ?= $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
CUDA ?= $(if $(NVCC),1,0)
Q := $(if $(V),,@)

PKGS := libmicrohttpd jansson libutf8proc libcurl libsodium libedit
DEBS := gcc g++ libc6-dev pkg-config libmicrohttpd-dev libjansson-dev libutf8proc-dev libcurl4-openssl-dev \
        libsodium-dev libedit-dev libcmocka-dev clang-format-14 python3 python3-venv python3-numpy

B := $(if $(filter fuzz,$(SAN)),build-fuzz,build$(if $(SAN),-san-$(SAN))$(if $(filter 0,$(CUDA)),-nocuda))

WARN := -Wall -Wextra -Wshadow -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes -Wvla -Werror
WARN_FLOOR01 := -Wconversion -Wno-sign-conversion
HARDEN := -fstack-protector-strong -D_FORTIFY_SOURCE=2 -fPIE
CFLAGS := -std=c11 -D_GNU_SOURCE -O2 -g -MMD -MP -Isrc -Iinclude -pthread -fno-strict-aliasing -ffp-contract=off $(WARN) $(HARDEN)
LDFLAGS := -pthread -pie -Wl,-z,relro,-z,now
LDLIBS = $(shell pkg-config --libs $(PKGS)) -lm

ifeq ($(SAN),1)
CFLAGS += -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -U_FORTIFY_SOURCE
LDFLAGS += -fsanitize=address,undefined
else ifeq ($(SAN),thread)
CFLAGS += -fsanitize=thread -fno-omit-frame-pointer -U_FORTIFY_SOURCE
LDFLAGS += -fsanitize=thread
else ifeq ($(SAN),fuzz)
CFLAGS += -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -U_FORTIFY_SOURCE
LDFLAGS += -fsanitize=fuzzer,address,undefined
endif

SRC := $(sort $(shell find src -name '*.c'))
OBJ := $(SRC:%.c=$B/%.o)
LIBOBJ := $(filter-out $B/src/cli/%,$(OBJ))

ifeq ($(CUDA),1)
CUSRC := $(sort $(shell find src -name '*.cu'))
CUOBJ := $(CUSRC:%.cu=$B/%.cu.o)
CUDA_HOME := $(patsubst %/bin/nvcc,%,$(NVCC))
CUDA_ARCH ?= -gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_80,code=compute_80
NVFLAGS := -std=c++17 -O3 -lineinfo -Isrc -Xcompiler -Wall,-Wextra,-fPIE -Werror all-warnings $(CUDA_ARCH)
CFLAGS += -DORCD_CUDA=1
LIBOBJ += $(CUOBJ)
LDLIBS += $(if $(CUSRC),-L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt -lstdc++)
endif

TESTS := $(sort $(wildcard tests/test_*.c))
TESTBIN := $(TESTS:tests/%.c=$B/tests/%)

.PHONY: all run man bench test fuzz fuzz-programs lint format deps clean install test-cuda test-cuda-sanitize

all: deps $B/orcd $B/liborcd.a
	$(Q)ln -sf $B/orcd orcd

# Kernels are compiled for the instruction set in their file's name; which one runs is decided at run time.
$B/%_avx2.o: CFLAGS += -mavx2 -mfma -mf16c -O3
$B/%_avxvnni.o: CFLAGS += -mavx2 -mfma -mf16c -mavxvnni -O3
$B/%_avx512.o: CFLAGS += -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512vbmi -mavx512bf16 -O3
$B/%_amx.o: CFLAGS += -mavx2 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq -mamx-tile -mamx-int8 -mamx-bf16 -O3
$B/src/base/%.o $B/src/format/%.o $B/src/text/%.o: CFLAGS += $(WARN_FLOOR01)

$B/%.o: %.c
	@mkdir -p $(@D)
	@echo "  cc    $<"
	$(Q)$(CC) $(CFLAGS) -c $< -o $@

$B/%.cu.o: %.cu
	@mkdir -p $(@D)
	@echo "  nvcc  $<"
	$(Q)$(NVCC) $(NVFLAGS) -MMD -MP -c $< -o $@

$B/liborcd.a: $(LIBOBJ)
	@echo "  ar    $@"
	$(Q)rm -f $@ && ar rcs $@ $^

$B/orcd: $(filter $B/src/cli/%,$(OBJ)) $B/liborcd.a
	@echo "  ld    $@"
	$(Q)$(CC) $(LDFLAGS) $^ $(LDLIBS) -o $@

$B/tests/%: $B/tests/%.o $B/liborcd.a
	@mkdir -p $(@D)
	$(Q)$(CC) $(LDFLAGS) $^ $(LDLIBS) -lcmocka -o $@

# Preloaded into orcd, it makes the GPU fail.
$B/tests/fault.so: tests/cuda/fault.c
	@mkdir -p $(@D)
	$(Q)$(CC) -std=c11 -D_GNU_SOURCE -O1 $(WARN) -fPIC -shared -pthread $< -ldl -o $@

$B/bench/%: $B/bench/%.o $B/liborcd.a
	@mkdir -p $(@D)
	$(Q)$(CC) $(LDFLAGS) $^ $(LDLIBS) -o $@

bench: $(patsubst %.c,$B/%,$(wildcard bench/*.c))

.SECONDARY: $(patsubst %.c,$B/%.o,$(wildcard bench/*.c)) $(TESTS:%.c=$B/%.o) $(patsubst %.c,$B/%.o,$(wildcard fuzz/*.c))

run: all
	./orcd run --temp 0.7 --seed 4

# The manual pages, made by the program from its own option tables.
man: $B/orcd
	$(Q)mkdir -p $B/man && $< manual >$B/man/orcd.1
	$(Q)for c in $$($< manual --names); do $< manual $$c >$B/man/orcd-$$c.1 || exit 1; done

PREFIX ?= /usr/local
DEST = $(DESTDIR)$(PREFIX)
install: man
	$(Q)install -D $B/orcd $(DEST)/bin/orcd
	$(Q)install -D -m 644 -t $(DEST)/share/orcd models/fable.gguf
	$(Q)install -D -m 644 -t $(DEST)/share/man/man1 $B/man/*.1
	$(Q)mkdir -p $(DEST)/share/{bash-completion/completions,zsh/site-functions,fish/vendor_completions.d}
	$(Q)$B/orcd completion bash >$(DEST)/share/bash-completion/completions/orcd
	$(Q)$B/orcd completion zsh >$(DEST)/share/zsh/site-functions/_orcd
	$(Q)$B/orcd completion fish >$(DEST)/share/fish/vendor_completions.d/orcd.fish

test: all $(TESTBIN) $B/tests/fault.so $B/bench/load
	$(Q)tests/run $B

# libFuzzer programs with clang, one per fuzz/fuzz_NAME.c. To run one for a minute from the seeds:
#   mkdir -p build-fuzz/new && build-fuzz/fuzz_NAME build-fuzz/new fuzz/corpus/NAME -max_total_time=60
fuzz:
	$(Q)$(MAKE) --no-print-directory CC=clang SAN=fuzz CUDA=0 WARN= WARN_FLOOR01= fuzz-programs

fuzz-programs: $(patsubst fuzz/%.c,$B/%,$(wildcard fuzz/fuzz_*.c))

$B/fuzz_%: $B/fuzz/fuzz_%.o $B/liborcd.a
	$(Q)$(CC) $(LDFLAGS) $^ $(LDLIBS) -lcmocka -o $@

# On a machine with a GPU: the backend against the reference, golden logits, the demo model against the CPU.
CUDA_TESTS := test_ops test_ops_sequence test_decode test_plan
CUDA_ENGINE_TESTS := test_engine test_engine_many
test-cuda: all $(patsubst %,$B/tests/%,$(CUDA_TESTS) $(CUDA_ENGINE_TESTS)) $B/tests/test_golden $B/tests/fault.so
	$(Q)for t in $(CUDA_TESTS) $(CUDA_ENGINE_TESTS); do $B/tests/$$t cuda || exit 1; done; $B/tests/test_golden
	$(Q)ORCD=$(CURDIR)/$B/orcd ORCD_BUILD=$B tests/cuda/run_cuda_faults

# The same operations under compute-sanitizer, and the fused steps on one layer: ten minutes.
# racecheck does not follow mbarriers that bulk copies complete: it is told to leave out the kernels with such rings
RACECHECK := --tool racecheck $(foreach k,dec_ few_ stream_kernel wide_kernel,--kernel-name-exclude kernel_substring=$k)
test-cuda-sanitize: $(CUDA_TESTS:%=$B/tests/%)
	$(Q)for tool in "--tool memcheck" "--tool initcheck" "$(RACECHECK)"; do for t in test_ops test_ops_sequence \
	    test_decode; do echo "$$tool: $$t"; \
	    compute-sanitizer $$tool --error-exitcode 9 $B/tests/$$t cuda quick >$B/tests/sanitize.log 2>&1 || \
	    { tail -40 $B/tests/sanitize.log; exit 1; }; done; done

lint:
	$(Q)tools/lint

format:
	$(Q)git ls-files '*.c' '*.h' '*.cu' '*.cuh' | xargs clang-format-14 -i

# Installs the missing Debian packages, or prints the one line that does.
deps:
	$(Q)tools/deps $(DEBS)

clean:
	rm -rf build build-* orcd

-include $(shell find $B -name '*.d' 2>/dev/null)
