import sys
from importlib.metadata import version as installed_version
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from generate import write_pages  # noqa: E402

write_pages(DOCS / "reference" / "generated")

project = "unirl"
version = release = installed_version("unirl-posttrain")
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"unirl {release}"
html_show_sphinx = False
html_copy_source = False
