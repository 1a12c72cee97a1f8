# `make demo` runs the main job, `make test` the tests, `make thorough` more sizes and forms of the same, `make check` what is quick;
# all make their environment first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# Test files run at once; each process takes up to 2 GiB. tests/conftest.py puts the longest files first.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder
LINKS := __init__.py __main__.py artifact.py backends.py caches.py cli.py cluster.py config.py doctor.py errors.py inputs.py inspection.py manifests.py \
	onnx_files.py packages.py pipeline.py plan_text.py progress.py records.py report_text.py run_text.py shell.py tables.py \
	targets_text.py py.typed units.py \
	export optimize plugins runtime validation

.PHONY: demo test thorough quick check lint typing docs clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@$(BIN)/foldkv run examples/demo.toml

test: $(STAMP)
	$(PYTEST) --durations 15

thorough: $(STAMP)
	$(PYTEST) --thorough --durations 15

quick: $(STAMP)
	$(PYTEST) -m 'not slow'

check: lint typing quick

lint: $(STAMP) .typing/foldkv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typing: $(STAMP) .typing/foldkv
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/generate.py

# Made anew when the requirements change; a stamp, so that an interrupted install is done again. Python compiles what it imports:
# compiling all 13,000 files of the packages would take half as long as installing them.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt \
		--editable '.[cpu,export,validation,evidence,serve,plugins,rtx,gpu,dev]'
	touch $@

# Type checkers do not see an editable install whose package is the checkout itself.
.typing/foldkv:
	mkdir -p $@ && ln -sfn $(addprefix ../../,$(LINKS)) $@/

clean:
	rm -rf $(VENV) .typing build *.egg-info demo
