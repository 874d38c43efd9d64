"""The real command line with plugins, for launchers: `accelerate launch ... entry.py RECIPE`, plugins in `FAULTS`."""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)
    from faults import plugins
    from hf_finetune.cli.main import main

    plugins.apply(json.loads(os.environ.get("FAULTS", "[]")))
    main()
