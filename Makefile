# `make quickstart` and `make test` are all a fresh machine needs: git, a Rust toolchain, a C++ compiler, make, python3 + pip.

CARGO ?= cargo

PREFIX ?= $(HOME)/.local

.PHONY: quickstart build install test test-capabilities faults check bench toy-clip promptdet-toy peers evaluation-peers libtorch clean

quickstart: build
	target/release/ovenbird run quickstart

build: libtorch
	$(CARGO) build --release

# The program in PREFIX/bin, the libraries that it loads in PREFIX/lib/ovenbird, man pages in PREFIX/share/man.
install: build
	mkdir -p $(PREFIX)/bin $(PREFIX)/lib $(PREFIX)/share/man/man1
	rm -rf $(PREFIX)/lib/ovenbird.new
	cp -rlL .libtorch/lib $(PREFIX)/lib/ovenbird.new 2>/dev/null || { rm -rf $(PREFIX)/lib/ovenbird.new; cp -rL .libtorch/lib $(PREFIX)/lib/ovenbird.new; }
	rm -rf $(PREFIX)/lib/ovenbird
	mv $(PREFIX)/lib/ovenbird.new $(PREFIX)/lib/ovenbird
	install target/release/ovenbird $(PREFIX)/bin/ovenbird
	target/release/ovenbird man $(PREFIX)/share/man/man1
	@$(PREFIX)/bin/ovenbird --version
	@case ":$$PATH:" in *":$(PREFIX)/bin:"*) ;; *) echo "add $(PREFIX)/bin to PATH to type just: ovenbird" ;; esac

test: libtorch
	$(CARGO) test --release --workspace --no-fail-fast

# The unit tests with fewer of the processor's instructions, as on an older machine. All crates: a part of them would be compiled anew.
test-capabilities: libtorch
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(CARGO) test --release --workspace --lib --no-fail-fast
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(CARGO) test --release --workspace --lib --no-fail-fast

# Every damage of every file class and 200 kills: some ten minutes.
faults: libtorch
	OVENBIRD_FAULTS=all $(CARGO) test --release --test main -- --nocapture --test-threads 1 faults::

check: libtorch
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny check bans licenses sources; else echo "skipped: cargo-deny is not installed"; fi

bench: libtorch
	$(CARGO) bench --bench evaluation --bench extraction --bench detector --bench localizer --bench training --bench probing --bench prompts --bench augmenter --bench store --bench estimate --bench search --bench pool --bench download

# Trains the small CLIPs of the stage `toy/clip` anew: see stages/assets/toy-clip/README.md.
toy-clip: build
	target/release/ovenbird run toy-clip
	for clip in resnet vit; do \
	    rm -rf target/toy-clip/$$clip && \
	    target/release/ovenbird export toy-clip $$clip.checkpoint target/toy-clip/$$clip && \
	    $(CARGO) run --release --package ovenbird-stages --example pack_toy_clip -- \
	        target/toy-clip/$$clip/clip.safetensors stages/assets/toy-clip/$$clip.safetensors.zst || exit 1; \
	done

# PromptDet on the toy world. Its web is served on this machine meanwhile.
promptdet-toy: build
	$(CARGO) build --release --example toy-web
	@target/release/examples/toy-web & web=$$!; trap 'kill $$web' EXIT; target/release/ovenbird run promptdet-toy

# The programs that benches and tests compare with; both say so where they are absent. Evaluation's are small, torch is not.
peers:
	python3 -m venv target/peers
	target/peers/bin/pip install --quiet --disable-pip-version-check -r benches/peers/requirements.txt
	python3 -m venv target/clip-retrieval
	target/clip-retrieval/bin/pip install --quiet --disable-pip-version-check -r benches/peers/requirements-clip-retrieval.txt
	python3 -m venv target/img2dataset
	target/img2dataset/bin/pip install --quiet --disable-pip-version-check img2dataset==1.47.0 setuptools

evaluation-peers:
	python3 -m venv target/peers
	target/peers/bin/pip install --quiet --disable-pip-version-check -r benches/peers/requirements-evaluation.txt

# Once per user: the libraries go into the cache folder, the source tree gets a link.
libtorch:
	@python3 tools/fetch_libtorch.py .libtorch

clean:
	rm -rf target .libtorch
