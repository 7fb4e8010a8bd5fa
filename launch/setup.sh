#!/usr/bin/env bash
# Makes .venv from a lock in launch/requirements/. Does nothing when it is up to date.
#   launch/setup.sh         CPU: what `make demo` needs
#   launch/setup.sh --dev   CPU and the tools of `make test`; also satisfies the plain one
#   launch/setup.sh --gpu   CUDA build of torch and vLLM
# UNIRL_VENV: another folder. UNIRL_TORCH_INDEX: where CPU builds of torch are. pip's own settings are honoured.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=launch/requirements
case "${1:-}" in
  "") lock=cpu ;; --dev) lock=dev ;; --gpu) lock=gpu ;;
  *) echo "launch/setup.sh: expected nothing, --dev or --gpu; got '$1'" >&2; exit 2 ;;
esac
V=${UNIRL_VENV:-.venv}
say() { printf '[setup %4ss] %s\n' "$SECONDS" "$*" >&2; }
fail() { tail -n 8 "$log" >&2; say "failed: $*"; exit 1; }
# The folder is part of the stamp because an environment that was moved or copied does not work.
stamp() { { pwd; cat "$requirements/$1.lock" pyproject.toml launch/setup.sh; } | sha256sum | cut -c1-16; }
ready() { grep -qsx "$(stamp "$lock")" "$V/.unirl-ready"; }

ready && exit 0
exec 9>.setup.lock
if command -v flock >/dev/null; then flock -n 9 || { say "another set-up runs; waiting for it"; flock 9; }; fi
ready && exit 0
log=$(mktemp); trap 'rm -f "$log"' EXIT

python=
for candidate in python3.11 python3.12 python3.13 python3; do
  # Run it: a version manager's shim may be on PATH without the version behind it.
  if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then python=$candidate; break; fi
done
[ -n "$python" ] || { say "failed: expected Python 3.11, 3.12 or 3.13 on PATH; got $(python3 -V 2>&1 || true); install one"; exit 1; }

say "environment $V with $("$python" -V)"
"$V/bin/python" -c '' 2>/dev/null || rm -rf "$V"
rm -f "$V/.unirl-ready"
"$python" -m venv "$V" 2>"$log" || fail "could not create $V; install Python's venv module or free disk space"
"$V/bin/pip" install -q --disable-pip-version-check "uv==0.13.8" 2>"$log" || say "no uv; going on with pip, which is slower"

# uv reads none of pip's settings: hand over its folders of wheels (a CPU torch may be there) and its indexes.
pip_setting() { "$V/bin/pip" config get "global.$1" 2>/dev/null | tr -s ' \n' ' ' || true; }
links=${PIP_FIND_LINKS:-$(pip_setting find-links)}
export UV_FIND_LINKS=${UV_FIND_LINKS:-$(echo $links | tr ' ' ',')}
indexes=${PIP_EXTRA_INDEX_URL:-$(pip_setting extra-index-url)}
export UV_INDEX=${UV_INDEX:-$(echo $indexes)}
index=${PIP_INDEX_URL:-$(pip_setting index-url)}
[ -z "$index" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$(echo $index)}
export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}    # pip's rule: the best version of any index

torch_index=${UNIRL_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
[ "$lock" = gpu ] && torch_index=${UNIRL_TORCH_INDEX:-}
by_uv() { [ -x "$V/bin/uv" ] && "$V/bin/uv" pip sync -q --python "$V/bin/python" "$@" "$requirements/$lock.lock" 2>>"$log"; }
by_pip() { "$V/bin/pip" install -q --disable-pip-version-check --no-deps "$@" -r "$requirements/$lock.lock" 2>>"$log"; }
say "packages: $(wc -l <"$requirements/$lock.lock") from $lock.lock (up to 3 GB, GPU 9 GB; usually under a minute)"
by_uv || { [ -n "$torch_index" ] && by_uv --index "$torch_index"; } \
  || { say "uv found no way; trying pip"; by_pip; } \
  || { [ -n "$torch_index" ] && by_pip --retries 1 --extra-index-url "$torch_index"; } \
  || fail "not every package of $lock.lock was found; for torch set PIP_FIND_LINKS (a folder with the wheel) or UNIRL_TORCH_INDEX (an index)"

say "unirl itself"
if [ -x "$V/bin/uv" ]; then editable="$V/bin/uv pip install -q --python $V/bin/python"; else editable="$V/bin/pip install -q"; fi
$editable --no-deps --no-build-isolation -e . 2>"$log" || fail "the project itself did not install"
hook=$("$V/bin/python" -c 'import sysconfig, unirl.torchvision_hook as h; print(sysconfig.get_path("purelib"), h.PTH_NAME, sep="/")')
if [ "$lock" = gpu ]; then rm -f "$hook"
else "$V/bin/python" -c 'import unirl.torchvision_hook as h; print(h.PTH_LINE, end="")' >"$hook"; fi

say "import check"
"$V/bin/python" -c 'import torchvision, vllm, ray, deepspeed' >>"$log" 2>&1 || fail "the packages do not import; delete $V and try again"
{ stamp "$lock"; [ "$lock" != dev ] || stamp cpu; } >"$V/.unirl-ready"
say "done, $(du -sh "$V" | cut -f1)"
