# Two commands for a newcomer: `make demo`, `make test`. `make check` while working; `make bench` compares with other tools.
PY      := .venv/bin/python
PIP     := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
SOURCES := settings.ini setup.py pyproject.toml constraints.txt
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= passive
export MPLBACKEND = agg

.PHONY: demo test check bench faults page readme clean

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
	$(PY) -m pytest -n 2 --junitxml=out/tests.xml tests

check: .venv/dev ## a minute: house rules, lint, and the pages and tests that a change touches
	OMP_NUM_THREADS=1 $(PY) tools/check.py

bench: .venv/bench ## side-by-side tables, ratios in one run
	$(PY) -m tools.bench

faults: .venv/dev ## kills, full disks, flipped bits, many readers and numbers that are none, many times: minutes
	$(PY) -m tools.faults
	$(PY) -m tools.faults.training

page: .venv/dev ## make page NB=nbs/calcium/05_score.ipynb: export, run, keep outputs, clean
	$(PY) tools/page.py $(NB)

readme: .venv/dev ## README.md from nbs/index.ipynb
	$(PY) tools/readme.py

clean:
	rm -rf .venv out build *.egg-info
