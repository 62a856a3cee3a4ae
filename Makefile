# Two commands: `make quickstart` and `make test`. Each sets up .venv first, once.
#   TORCH=cpu      take torch's CPU build even if an NVIDIA driver is here
#   TORCH=default  take the ordinary build
#   PYTHON=…       the Python to use (3.11 or newer)
#   WORKERS=1      tests in one process (auto: one for each core, four at most); ARGS=… is pytest's
PYTHON ?= python3
TORCH ?= auto
WORKERS ?= auto
BIN = .venv/bin

.PHONY: quickstart test clean

quickstart:
	@$(PYTHON) install.py quickstart --torch $(TORCH)
	@$(BIN)/edgelora quickstart

test:
	@$(PYTHON) install.py test --torch $(TORCH)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder $(ARGS)

clean:
	rm -rf .venv build *.egg-info edgelora/kernels/native.* .pytest_cache .mypy_cache .ruff_cache
