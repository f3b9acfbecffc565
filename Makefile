PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINIMUM := .venv-minimum
DETECTRON2 := $(VENV)/detectron2
RELEASE := .venv-release
RUN ?= runs
CORE_TESTS := tests/diffusion tests/models tests/data tests/visualization tests/test_files.py tests/test_devices.py \
	tests/detection/test_boxes.py tests/detection/test_matcher.py tests/detection/test_detector.py
# The simulated GPU is made for the tested torch; older ones have no forward-mode derivative of a group norm whose
# channels are last.
NEWEST_ONLY := simulated or forward_mode

.PHONY: help install demo demo-segmentation test test-minimum lint types dist clean

help: ## say what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(VENV)/installed ## make .venv and install the tested versions

$(VENV)/installed: pyproject.toml constraints.txt tests/integrations/detectron2.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev,neighbours]'
	mkdir -p $(DETECTRON2)
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --require-hashes --dest $(DETECTRON2) \
		--requirement tests/integrations/detectron2.txt
	tar --extract --gzip --strip-components 1 --directory $(DETECTRON2) --file $(DETECTRON2)/pb1-detectron2-0.6.tar.gz
	$(BIN)/python -c 'import site; open(site.getsitepackages()[0] + "/detectron2.pth", "w").write("$(abspath $(DETECTRON2))\n")'
	touch $@

demo: install ## draw the shapes data set, train a detector on it, print its COCO table and say where the pictures are (6 minutes)
	$(BIN)/diffperception shapes --output data/shapes
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=2 -m diffperception train configs/detection/shapes.yaml \
		--output $(RUN)/shapes --overwrite

demo-segmentation: install ## draw shapes, train their generator without labels, find shapes with ten masks (6 minutes)
	$(BIN)/diffperception shapes --output data/scenes --min-side 40 --max-side 40 --max-objects 3 --min-size 18
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=2 -m diffperception train configs/generation/shapes_scenes.yaml \
		--data.batch_size 4 --output $(RUN)/scenes_ddpm --overwrite
	$(BIN)/diffperception train configs/segmentation/shapes.yaml --output $(RUN)/scenes_masks --overwrite \
		--features.generator $(RUN)/scenes_ddpm/model.safetensors

test: lint types ## lint, types and the fast tests, a file a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-minimum: $(MINIMUM)/installed ## the fast tests of the core with the oldest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(MINIMUM)/bin/python -m pytest --numprocesses auto --dist loadfile $(CORE_TESTS) -k 'not ($(NEWEST_ONLY))'

$(MINIMUM)/installed: pyproject.toml $(VENV)/installed
	$(BIN)/uv venv --quiet --clear --python '>=3.10,<3.13' $(MINIMUM)
	$(BIN)/uv pip install --quiet --python $(MINIMUM)/bin/python --resolution lowest-direct --editable . \
		'diffusers>=0.35' 'pycocotools>=2.0.8' 'pytest>=8.3' 'pytest-xdist>=3.6'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

dist: install ## build the wheel and the source archive, install each into an empty environment and begin the demo there
	rm -rf dist
	$(BIN)/uv build --quiet --out-dir dist
	set -e; for file in dist/*.whl dist/*.tar.gz; do \
		$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(RELEASE); \
		$(BIN)/uv pip install --quiet --python $(RELEASE)/bin/python --constraint constraints.txt $$file; \
		(cd $(RELEASE); \
			bin/diffperception doctor; \
			bin/diffperception shapes --output data/shapes; \
			bin/diffperception train ../configs/detection/shapes.yaml --trainer.max_steps 20 --evaluation.num_images 10); \
	done

clean: ## remove the environment (runs and data stay)
	rm -rf $(VENV) $(MINIMUM) $(RELEASE)
