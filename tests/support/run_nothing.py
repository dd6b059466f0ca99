"""A stand-in for ``run_model`` in tests of ``model_runs``: says the numbers of its cases, or ends as they ask."""

import json
import sys
import time

for case in json.loads(sys.argv[1])[int(sys.argv[2]) :]:
    if case["kind"] == "ends":
        sys.exit("said at the end")
    if case["kind"] == "hangs":
        time.sleep(3600)
    print(json.dumps({"number": case["number"]}), flush=True)
    if case["kind"] == "breaks":
        sys.exit(case["broken"])
