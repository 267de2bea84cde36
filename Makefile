# make demo   environment, a one-minute pretraining run on the packaged sample, its evaluation
# make test   environment if needed, then the fast tests
# make test-newer  the same but for goldens, in an environment of a newer interpreter (VENV, PYTHON)
# make test-torch  compare with the PyTorch package
# make test-maps  read archives with other programs, and embed with Ray (Python >= 3.12)
# make test-oldest  the fast tests with the oldest declared versions of everything (Python 3.11)
# make learn  pretrain nano on the packaged sample from three seeds; are its features better? (20 minutes)
# make examples  run the notebooks of docs/examples
# make lint   style and types
# make bench  benchmarks that a CPU can run
# make lock   versions of the image's packages, for its Python (LOCK_PYTHON)
# PYTHON=...  another interpreter; VENV=... another environment folder; TORCH=torch==... a build

VENV ?= .venv
RUN ?= demo
TORCH ?= torch
BIN = $(VENV)/bin
# The newest interpreter that runs and can make environments: version managers put commands on the
# path that do neither.
PYTHON ?= $(shell for v in 3.14 3.13 3.12 3.11 3; do \
	for p in python$$v /usr/local/bin/python$$v /usr/bin/python$$v; do \
	if $$p -c "import sys, venv, ensurepip; sys.exit(sys.version_info[:2] < (3, 11))" \
	>/dev/null 2>&1; then echo $$p; exit; fi; done; done)

.PHONY: demo test test-slow test-newer newer-python test-torch test-oldest learn examples lint lock bench env env-torch env-maps
.PHONY: test-maps clean

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

demo: env
	$(BIN)/python -m launch.train --config=configs/nano.py:smoke --run_name=$(RUN) \
		--config.common.training_modalities='[sentinel2_l2a,openstreetmap_raster]'
	$(BIN)/python -m launch.evaluate --run_name=$(RUN)
	@echo
	@echo "Checkpoints, metrics.jsonl, TensorBoard logs and evaluations: local_output/$(RUN)"
	@echo "Pictures of what the model saw, its masks and its features: local_output/$(RUN)/report.html"
	@echo "Twenty steps show that everything works, not that a model learns: make learn does that."
	@echo "Next:"
	@echo "  $(BIN)/python -m tools.inspect_checkpoint --checkpoint=local_output/$(RUN)"
	@echo "  $(BIN)/python -m launch.dry_run --config=configs/base.py --run_name=base"
	@echo "  $(BIN)/python -m launch.train --config=configs/nano.py --run_name=nano \\"
	@echo "      --config.dataset.h5py_dir=/path/to/h5data/num_samples"

test: env
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not torch"

test-newer: env
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not torch" --ignore-glob="*goldens*"

# The newest interpreter on the path that is newer than the environment's, or nothing.
newer-python: env
	@for v in 3.14 3.13 3.12; do \
	if python$$v -c "import venv, ensurepip" >/dev/null 2>&1; then \
	python$$v -c "import sys; raise SystemExit('%d.%d' % sys.version_info[:2] <= '$(shell \
	$(BIN)/python -c "import sys; print('%d.%d' % sys.version_info[:2])")')" && echo python$$v; \
	exit 0; fi; done

test-slow: env
	$(BIN)/python -m pytest -q -n 2 --durations=40 -m "slow and not torch"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# An environment of its own: PyTorch is large and nothing else needs it.
env-torch:
	test -x $(VENV)-torch/bin/python || $(PYTHON) -m venv $(VENV)-torch
	$(VENV)-torch/bin/python -m pip install --quiet "$(TORCH)" olmoearth-pretrain-minimal
	$(VENV)-torch/bin/python -m pip install --quiet -e ".[convert,geo,hub]" pytest hypothesis \
		shapely pyproj pydantic
	$(VENV)-torch/bin/python -m pip install --quiet --no-deps rslearn==0.1.19

test-torch: env-torch
	$(VENV)-torch/bin/python -m pytest -q -m "torch and not slow" tests/interop

# Other programs that read archives, and Ray: in an environment of their own, of Python 3.12 or later.
PYENV_ROOT ?= $(shell pyenv root 2>/dev/null)
MAPS_PYTHON ?= $(shell for v in 3.13 3.12 3.14; do \
	for p in python$$v $(PYENV_ROOT)/versions/$$v.*/bin/python; do \
	if $$p -c "import venv, ensurepip" >/dev/null 2>&1; then echo $$p; exit; fi; done; done)
env-maps:
	@test -n "$(MAPS_PYTHON)" || { echo "no Python >= 3.12 found; set MAPS_PYTHON"; exit 1; }
	test -x $(VENV)-maps/bin/python || $(MAPS_PYTHON) -m venv $(VENV)-maps
	$(VENV)-maps/bin/python -m pip install --quiet -e ".[geo,zarr,maps-test]"

test-maps: env env-maps
	$(BIN)/python -m pytest -q tests/maps/test_other_readers.py tests/maps/test_ray.py

OLDEST_PYTHON ?= python3.11
test-oldest:
	mkdir -p build
	$(OLDEST_PYTHON) tools/oldest.py > build/oldest.txt
	test -x $(VENV)-oldest/bin/python || $(OLDEST_PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet -c build/oldest.txt -e ".[dev,geo,zarr]"
	$(VENV)-oldest/bin/python -m pytest -q -n 2 -W ignore::DeprecationWarning -m "not slow and not torch"

examples: env
	$(BIN)/python -m pytest -q tests/test_examples.py

LEARN ?= learn
LEARN_STEPS ?= 2400
LEARN_SEEDS ?= 1 2 3
learn: env
	for seed in $(LEARN_SEEDS); do \
		$(BIN)/python -m launch.train --config=configs/nano.py:smoke --run_name=$(LEARN)_$$seed \
			--config.common.training_modalities='[sentinel2_l2a,openstreetmap_raster]' \
			--config.init_seed=$$seed --config.data_loader.seed=$$seed \
			--config.trainer.max_duration.value=$(LEARN_STEPS) \
			--config.train_module.optim_config.lr=1.5e-3 \
			--config.train_module.optim_config.betas='[0.9,0.95]' \
			--config.train_module.scheduler.warmup=200 \
			--config.trainer.metrics_collect_interval=50 \
			--config.trainer.callbacks.checkpointer.save_interval=$(LEARN_STEPS) \
			--config.trainer.callbacks.checkpointer.ephemeral_save_interval=400 \
			--config.trainer.callbacks.downstream_evaluator.enabled=False || exit 1; \
	done
	$(BIN)/python -m tools.learned --picture=local_output/$(LEARN).png \
		$(addprefix local_output/$(LEARN)_,$(LEARN_SEEDS))

# What pip would install today; --dry-run fetches little more than the packages' descriptions.
LOCK_PYTHON ?= python3.12
lock:
	$(LOCK_PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --dry-run --ignore-installed \
		--report build/lock/report.json ".[geo,hub,remote,wandb]"
	build/lock/bin/python -c 'import json; found = json.load(open("build/lock/report.json")); \
		names = [i["metadata"] for i in found["install"]]; \
		print("# Written by make lock.", *sorted(n["name"].lower() + "==" + n["version"] for n in names \
		if n["name"] != "olmoearth-jax"), sep="\n")' > requirements.lock
	rm -rf build/lock

bench: env
	$(BIN)/python -m tools.bench.padding --config=configs/nano.py
	$(BIN)/python -m tools.bench.train_step --config=configs/nano.py --grids=2,5,12
	$(BIN)/python -m tools.make_synthetic_dataset --output_dir=local_output/synthetic --num_samples=60
	$(BIN)/python -m tools.bench.data_loader \
		--h5py_dir=$$(dirname $$(find local_output/synthetic -name sample_0.h5 | head -1))

clean:
	rm -rf $(VENV) $(VENV)-torch build dist *.egg-info
