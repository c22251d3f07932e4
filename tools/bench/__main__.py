"`python -m tools.bench [NAME...]`: run the benchmark tables."
import importlib, pkgutil, sys

import tools.bench as here

for name in sys.argv[1:] or sorted(m.name for m in pkgutil.iter_modules(here.__path__) if not m.name.startswith('_')):
    importlib.import_module(f'tools.bench.{name}').main()
