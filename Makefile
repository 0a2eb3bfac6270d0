# make demo       the whole loop on two CPU cores
# make test       the tests                          make quick     those that take less than a second each
# make lint       is everything formatted and clean  make evidence  the README's numbers: hours
# Each makes a virtual environment from requirements.txt first.
PYTHON ?= python3
VENV ?= .venv
export PYTHONUNBUFFERED = 1

.PHONY: demo test quick lint evidence clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/python -m experiments demo

# Hours on one core; interrupted, it goes on. Each with --list says which rows are left. The policy's start from make demo.
evidence: $(VENV)/installed
	$(VENV)/bin/python -m experiments simulator
	$(VENV)/bin/python -m experiments policy
	$(VENV)/bin/python -m experiments world2vlm

test: $(VENV)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q tests

quick: $(VENV)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m "not slow" tests

lint: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

clean:
	rm -rf out $(VENV)
