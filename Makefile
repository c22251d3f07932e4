# Two commands for a newcomer: `make demo`, `make test`. `make bench` compares with other tools.
PY      := .venv/bin/python
PIP     := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
SOURCES := settings.ini setup.py pyproject.toml constraints.txt
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= passive
export MPLBACKEND = agg

.PHONY: demo test bench faults page readme clean

.venv/made:
	python3 -m venv .venv
	$(PIP) torch
	touch $@

.venv/base: .venv/made $(SOURCES)
	$(PIP) -e .
	touch $@

.venv/dev: .venv/base
	$(PIP) -e '.[dev,codecs,compression,streamlines,dicomout,comet,lightning]'
	touch $@

.venv/bench: .venv/dev
	$(PIP) -e '.[bench]'
	touch $@

demo: .venv/base ## a small synthetic cohort, scored, with a report
	$(PY) -m jfr2020 demo -o out/demo

test: .venv/dev ## every check, ends with pytest's own line
	$(PY) tools/house_checks.py .
	$(PY) -m ruff check .
	$(PY) -m pytest -n 2 tests

bench: .venv/bench ## side-by-side tables, ratios in one run
	$(PY) -m tools.bench

faults: .venv/dev ## kills, full disks, flipped bits, many readers and numbers that are none, many times: minutes
	$(PY) -m tools.faults
	$(PY) -m tools.faults.training

page: .venv/dev ## make page NB=nbs/22_calcium.ipynb: export, run, keep outputs, clean
	$(PY) tools/page.py $(NB)

readme: .venv/dev ## README.md from nbs/index.ipynb
	$(PY) tools/readme.py

clean:
	rm -rf .venv out build *.egg-info
