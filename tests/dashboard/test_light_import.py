import subprocess
import sys

BLOCKED = ("torch", "ray", "vllm", "transformers", "deepspeed", "pyarrow", "faiss", "open_clip", "omegaconf")
PROGRAM = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Block())
from unirl.cli import main
try:
    main(["dashboard", "--help"])
except SystemExit as end:
    assert end.code == 0
from pathlib import Path
from starlette.testclient import TestClient
from unirl.dashboard.app import create_app
import unirl.jobs.dashboard
runs = Path(sys.argv[1])
client = TestClient(create_app(runs), base_url="http://127.0.0.1")
run = "/api/run/grid~1seed~00"
for address in ("/api/runs", run, run + "/strip", run + "/metrics?names=learner/loss", run + "/events", run + "/fleet",
                run + "/pairs?text=a", run + "/pair?step=2&pair_id=pair-2-0", run + "/similarities",
                run + "/pair_history?pair_id=pair-2-0", "/api/compare?runs=grid/seed~0"):
    answer = client.get(address)
    assert answer.status_code == 200, (address, answer.text)
assert not set(sys.modules) & set({BLOCKED}), set(sys.modules) & set({BLOCKED})
print("served")
"""


def test_the_dashboard_serves_where_only_light_packages_are(finished_runs):
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(finished_runs)], capture_output=True, text=True, check=False
    )
    assert ran.stdout.endswith("served\n"), ran.stderr
