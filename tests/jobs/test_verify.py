"""Each gate passes on a good checkpoint and names a defect that was planted for it."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from tests.janus_checkpoints import write_janus, write_prompts
from tests.joint_rollouts import write_case
from tests.vq_checkpoints import noise
from unirl import cli
from unirl.config import ModelConfig, RlConfig, RolloutConfig, SamplingConfig
from unirl.data.records import file_name, write_samples
from unirl.jobs import verify, verify_gates
from unirl.jobs.assets import resolve_checkpoint
from unirl.jobs.local import LocalLearner
from unirl.jobs.verify_bench import Finding
from unirl.models.janus_pro import JanusPro
from unirl.models.policy import load_independent
from unirl.types import GenerationSample, UnderstandingSample

# The optimizer check of DeepSpeed imports a compiled function; without the compiler that takes seconds less.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

LAB = resolve_checkpoint("lab:janus")
CONFIG = verify.settings_for(RlConfig(rollout=RolloutConfig(backend="torch")), LAB)
IN_BFLOAT16 = replace(CONFIG, model=replace(CONFIG.model, dtype="bfloat16"))


class Other:
    """A sampler with something changed: what is not overridden is the good one's."""

    def __init__(self, sampler):
        self._sampler = sampler

    def __getattr__(self, name):
        return getattr(self._sampler, name)

    def sample(self, requests, sampling):
        return self._sampler.sample(requests, sampling)

    def load_weights(self, manifest, tensors):
        self._sampler.load_weights(manifest, tensors)


class Colder(Other):
    def sample(self, requests, sampling):
        text, image = (replace(part, temperature=0.8 * part.temperature) for part in (sampling.text, sampling.image))
        return super().sample(requests, SamplingConfig(text=text, image=image))


class MoreGuided(Other):
    """Takes another formula of guidance, which is the same without guidance."""

    def sample(self, requests, sampling):
        scale = 1 + 1.01 * (sampling.image.guidance_scale - 1)
        return super().sample(requests, replace(sampling, image=replace(sampling.image, guidance_scale=scale)))


class Sociable(Other):
    """Draws otherwise in company."""

    def sample(self, requests, sampling):
        text = replace(sampling.text, temperature=1 + 0.2 * len(requests))
        return super().sample(requests, replace(sampling, text=text))


class Stale(Other):
    def load_weights(self, manifest, tensors):
        pass


class Careless(Other):
    """Loads a weight wrongly."""

    def load_weights(self, manifest, tensors):
        super().load_weights(manifest, tensors)
        move(self._sampler.policy)


class LateRefusal(Other):
    """Finds a foreign manifest only after it has written."""

    def load_weights(self, manifest, tensors):
        move(self._sampler.policy)
        super().load_weights(manifest, tensors)


def move(policy, size=0.01):
    with torch.no_grad():
        policy.module.lm_head.weight[::2] += size


def verdicts(findings):
    return [finding.verdict for finding in findings]


def failures(findings):
    return [finding for finding in findings if finding.verdict == "fail"]


@pytest.fixture(scope="module")
def pairs():
    return verify.prompts_of(CONFIG, 2)


@pytest.fixture(scope="module")
def still(pairs):
    """A bench without a learner, for what changes no weight."""
    return verify.open_bench(CONFIG, LAB, pairs, None)


@pytest.fixture
def learner():
    made = LocalLearner(CONFIG, LAB)
    yield made
    made.close()


@pytest.fixture
def bench(pairs, learner):
    return verify.open_bench(CONFIG, LAB, pairs, learner)


def test_a_weight_unlike_the_files_is_named(still, pairs):
    (good,) = verify_gates.check_layout(still, LAB)
    assert (good.figure, good.verdict) == (0, "pass")
    assert f"of {len(still.policy.shapes)} (" in good.measured
    moved = verify.open_bench(CONFIG, LAB, pairs, None)
    with torch.no_grad():
        moved.policy.module.model.language_model.norm.weight += 1e-3
    (bad,) = verify_gates.check_layout(moved, LAB)
    assert (bad.figure, bad.verdict) == (1, "fail")
    assert "model.language_model.norm.weight" in bad.reason


def test_sampler_and_learner_agree_and_the_conditional_loss_has_a_price(still):
    findings = list(verify_gates.check_agreement(still))
    assert verdicts(findings) == ["pass", "pass", "pass", "information", "pass", "information"]
    assert [f.limit for f in findings if f.limit] == pytest.approx([1e-5, 1e-5, 5e-5, 9e-5])
    at_3, at_5 = (f.figure for f in findings if f.verdict == "information")
    assert 0.01 < at_3 < at_5


def test_another_temperature_is_seen_in_every_row_of_the_agreement(still):
    findings = list(verify_gates.check_agreement(replace(still, sampler=Colder(still.sampler))))
    assert [f.verdict for f in findings if f.limit] == ["fail"] * 4


def test_another_formula_of_guidance_is_seen_where_there_is_guidance(still):
    findings = list(verify_gates.check_agreement(replace(still, sampler=MoreGuided(still.sampler))))
    assert [f.verdict for f in findings if f.limit] == ["pass", "pass", "fail", "fail"]


def test_other_weights_in_the_sampler_are_seen(still, pairs):
    moved = verify.open_bench(CONFIG, LAB, pairs, None)
    move(moved.sampler.policy, 1e-3)
    findings = list(verify_gates.check_agreement(replace(still, sampler=moved.sampler)))
    assert [f.verdict for f in findings if f.limit] == ["fail"] * 4


def test_bfloat16_has_limits_of_its_own_that_tell_another_temperature(pairs):
    bench = verify.open_bench(IN_BFLOAT16, LAB, pairs, None)
    findings = list(verify_gates.check_agreement(bench))
    assert verdicts(findings) == ["pass"] * 8
    assert [f.limit for f in findings[:2]] == [0.5, 0.02]
    broken = list(verify_gates.check_agreement(replace(bench, sampler=Colder(bench.sampler))))
    assert len(failures(broken)) >= 2
    assert {f.measured.split()[0] for f in failures(broken)} >= {"mean"}
    (company,) = verify_gates.check_company(bench)
    assert company.verdict == "information"


def test_a_sampler_that_draws_otherwise_in_company_is_seen(still):
    (good,) = verify_gates.check_company(still)
    assert (good.figure, good.verdict) == (0, "pass")
    (bad,) = verify_gates.check_company(replace(still, sampler=Sociable(still.sampler)))
    assert bad.verdict == "fail"
    assert bad.figure > 0


def test_greedy_tokens_are_those_of_transformers_own_generate(still, pairs):
    independent = load_independent(CONFIG.model, LAB)
    text, image, picture = verify_gates.check_greedy(still, independent)
    assert (text.verdict, image.verdict, picture.verdict) == ("pass", "pass", "pass")
    assert text.measured.endswith("of 2")
    moved = verify.open_bench(CONFIG, LAB, pairs, None)
    move(moved.sampler.policy, 0.3)
    text, image, picture = verify_gates.check_greedy(replace(still, sampler=moved.sampler), independent)
    assert (text.verdict, image.verdict, picture.verdict) == ("fail", "fail", "pass")
    (absent,) = verify_gates.check_greedy(still, None)
    assert absent.verdict == "not applicable"
    assert absent.reason


def no_pixels(policy, images):
    return torch.zeros(len(images), 3, policy.image_processor.size["height"], policy.image_processor.size["width"])


def other_null_condition(policy, prompt_ids):
    return torch.full_like(prompt_ids, policy.end_id)


def shifted_codes(policy, codes):
    return policy.module.model.generation_aligner(policy.module.model.generation_embeddings((codes + 1) % 16))


@pytest.mark.parametrize(
    ("method", "defect", "seen"),
    [
        ("unconditional", other_null_condition, ("pass", "fail")),
        ("embed_codes", shifted_codes, ("pass", "fail")),
    ],
)
def test_a_defect_that_sampler_and_learner_share_is_seen_in_greedy_tokens(still, monkeypatch, method, defect, seen):
    independent = load_independent(CONFIG.model, LAB)
    monkeypatch.setattr(JanusPro, method, defect)
    # Up to guidance 3: at 5 the logits of a broken model are large enough to reach the limit by rounding.
    assert not failures(list(verify_gates.check_agreement(still))[:4])
    assert tuple(verdicts(verify_gates.check_greedy(still, independent))) == (*seen, "pass")


def test_pictures_that_never_reach_the_prompt_are_refused_by_the_sampler(still, monkeypatch):
    monkeypatch.setattr(JanusPro, "_pixels", no_pixels)
    with pytest.raises(ValueError, match="placeholder tokens without pixels"):
        list(verify_gates.check_agreement(still))


def test_a_sampler_that_may_draw_any_id_is_seen_in_its_answers(still, pairs):
    open_minded = verify.open_bench(CONFIG, LAB, pairs, None).sampler
    open_minded.policy.allowed_text_ids[:] = True
    findings = verify_gates.check_agreement(replace(still, sampler=open_minded))
    assert [f.verdict for f in findings if f.limit] == ["fail", "pass", "pass", "pass"]


def test_a_sampler_of_another_precision_is_seen(still, pairs):
    rounded = verify.open_bench(IN_BFLOAT16, LAB, pairs, None).sampler
    findings = verify_gates.check_agreement(replace(still, sampler=rounded))
    assert [f.verdict for f in findings if f.limit] == ["fail"] * 4


def test_all_learning_gates_pass_in_their_order(bench, learner):
    findings = [finding for _, gate in verify_gates.LEARNING_GATES for finding in gate(bench, learner)]
    assert verdicts(findings) == ["pass"] * 11
    rate_0 = [f.figure for f in findings if f.gate == "learning rate 0"]
    assert rate_0[0] == 0
    assert rate_0[1] <= 1e-6


def test_a_sampler_that_loads_a_weight_wrongly_is_seen(bench, learner):
    broken = replace(bench, sampler=Careless(bench.sampler))
    assert verdicts(verify_gates.check_same_weights(broken, learner)) == ["fail", "pass"]
    assert verdicts(verify_gates.check_moved_weights(broken, learner)) == ["pass", "fail", "fail"]


def test_a_sampler_that_keeps_its_old_weights_is_seen(bench, learner):
    broken = replace(bench, sampler=Stale(bench.sampler))
    assert verdicts(verify_gates.check_same_weights(broken, learner)) == ["pass", "pass"]
    assert verdicts(verify_gates.check_moved_weights(broken, learner)) == ["fail", "fail", "fail"]


def test_a_sampler_that_takes_another_models_weights_is_seen(bench, learner):
    taken, _ = verify_gates.check_foreign_weights(replace(bench, sampler=Stale(bench.sampler)), learner)
    assert (taken.figure, taken.verdict) == (2, "fail")
    refused, trace = verify_gates.check_foreign_weights(replace(bench, sampler=LateRefusal(bench.sampler)), learner)
    assert (refused.verdict, trace.verdict) == ("pass", "fail")


class Restless:
    """A learner that moves at learning rate 0, too."""

    def __init__(self, learner):
        self._learner = learner

    def __getattr__(self, name):
        return getattr(self._learner, name)

    def update(self, batch, step):
        metrics = self._learner.update(batch, step)
        move(self._learner.policy, 1e-6)
        return metrics


def test_a_weight_that_moves_at_rate_0_is_seen(bench, learner):
    list(verify_gates.check_moved_weights(bench, learner))
    weights, ratios = verify_gates.check_rate_0(bench, Restless(learner))
    assert (weights.figure, weights.verdict, ratios.verdict) == (1, "fail", "pass")
    assert "embed_tokens.weight" in weights.reason  # the lab's head is tied


def test_rate_0_does_not_apply_before_the_update_that_moves(bench, learner):
    (finding,) = verify_gates.check_rate_0(bench, learner)
    assert finding.verdict == "not applicable"
    assert finding.reason


def test_randomness_in_the_learners_forward_pass_is_seen_in_the_ratios(bench, learner):
    list(verify_gates.check_moved_weights(bench, learner))
    learner.policy.module.lm_head.register_forward_hook(lambda module, ins, out: out + 1e-3 * torch.randn_like(out))
    weights, ratios = verify_gates.check_rate_0(bench, learner)
    assert (weights.verdict, ratios.verdict) == ("pass", "fail")
    assert ratios.figure > 1e-5


def test_a_task_without_a_gradient_is_seen(bench, learner):
    learner.policy.module.model.generation_head.register_forward_hook(lambda module, ins, out: out.detach())
    text, image = verify_gates.check_gradients(bench, learner)
    assert (text.verdict, image.verdict) == ("pass", "fail")
    assert "expected a gradient" in image.reason


def test_a_gate_that_breaks_off_has_failed_and_says_why(still):
    def gate():
        yield Finding(gate="one", dtype="float32", measured="before", verdict="pass")
        raise RuntimeError("the engine died")

    first, second = verify.checked("one", still, gate)
    assert (first.verdict, second.verdict) == ("pass", "fail")
    assert second.reason == "RuntimeError: the engine died"


@pytest.fixture(scope="module")
def random_janus(tmp_path_factory):
    """Folder of a tiny random checkpoint with a folder of prompts in its words, and the settings that name them."""
    folder = tmp_path_factory.mktemp("random")
    write_janus(folder / "checkpoint")
    write_prompts(folder / "prompts")
    return folder


def settings_of(folder, *more):
    return [
        "verify", "--checkpoint", str(folder / "checkpoint"), f"evaluation.data={folder / 'prompts'}",
        "rollout.backend=torch", "rollout.sampling.text.max_tokens=8", "--prompts", "2", "-q", *more,
    ]  # fmt: skip


def test_a_random_checkpoint_passes_every_gate_as_json(random_janus):
    result = CliRunner().invoke(cli.app, settings_of(random_janus, "--json"))
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["passed"], document["family"], document["sampler"]) == (True, "janus_pro", "torch")
    assert {row["verdict"] for row in document["gates"]} == {"pass", "information"}
    names = [(row["gate"], row["dtype"]) for row in document["gates"]]
    assert (
        dict.fromkeys(names).keys()
        == dict.fromkeys(
            [
                *((gate, "float32") for gate in ("layout", "special ids", "agreement", "conditional loss")),
                *((gate, "float32") for gate in ("batch company", "padding", "greedy tokens", "pictures")),
                *((gate, "float32") for gate in ("weight sync", "learning rate 0", "gradient")),
                *((gate, "bfloat16") for gate in ("layout", "agreement", "batch company", "padding")),
            ]
        ).keys()
    )


@pytest.fixture(scope="module", params=["anole", "liquid"])
def random_joint(request, tmp_path_factory):
    """The same of a family with one joint vocabulary, and the settings of its checkpoint."""
    folder = tmp_path_factory.mktemp("joint")
    model, _ = write_case(folder / "checkpoint", request.param)
    words = ("red", "green", "circle")
    questions = [
        UnderstandingSample(
            id=f"q{i}", image=noise(9, 7, i), question=f"what color is a {word} ?", choices=("red", "green"), answer="A"
        )
        for i, word in enumerate(words)
    ]
    drawings = [GenerationSample(id=f"g{i}", prompt=f"draw a {word}") for i, word in enumerate(words)]
    (folder / "prompts").mkdir()
    for kind, samples in ((UnderstandingSample, questions), (GenerationSample, drawings)):
        write_samples(folder / "prompts" / file_name(kind), samples, kind)
    settings = [f"model.family={model.family}", "model.frozen=[]"]
    return folder, settings + [f"model.image_tokenizer={model.image_tokenizer}"] * bool(model.image_tokenizer)


PUBLISHED = pytest.mark.parametrize(("size", "shard"), [("1B", "1GB"), ("7B", "4MB")])


def write_published(folder, size, shard):
    """Ids, vocabulary, untied heads and proportions of the public checkpoint, in bfloat16; returns verify's words."""
    write_janus(folder / "checkpoint", size, shard=shard, dtype=torch.bfloat16)
    write_prompts(folder / "prompts")
    assert (folder / "checkpoint/model.safetensors").is_file() == (size == "1B")
    return settings_of(
        folder, "-c", f"configs/rl/janus_pro_{size.lower()}.yaml", "model.dtype=float32", "--prompts", "1",
        "rollout.sampling.text.max_tokens=4", "rollout.kv_cache_memory_gib=0.125", "rollout.max_model_len=128",
        "rollout.enforce_eager=true",
    )  # fmt: skip


@PUBLISHED
def test_a_checkpoint_in_the_published_layout_passes(tmp_path, size, shard):
    result = CliRunner().invoke(cli.app, write_published(tmp_path, size, shard))
    assert result.exit_code == 0, result.output
    assert "this checkpoint can be trained on" in result.stdout
    assert "FAIL" not in result.stdout


@pytest.mark.slow
@PUBLISHED
def test_a_checkpoint_in_the_published_layout_passes_with_vllm(tmp_path, size, shard):
    """In a process of its own, since vLLM leaves its process group behind."""
    words = [*write_published(tmp_path, size, shard), "rollout.backend=vllm"]
    command = [sys.executable, "-c", "from unirl.cli import main; main()", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "sampler vllm" in done.stdout
    assert "FAIL" not in done.stdout


def test_a_joint_vocabulary_passes_every_gate(random_joint):
    folder, settings = random_joint
    result = CliRunner().invoke(cli.app, settings_of(folder, "--json", *settings))
    assert result.exit_code == 0, result.output
    gates = json.loads(result.stdout)["gates"]
    assert {row["verdict"] for row in gates} == {"pass", "information"}
    passed = {row["gate"] for row in gates if row["verdict"] == "pass" and row["dtype"] == "float32"}
    assert passed == {
        "layout",
        "agreement",
        "greedy tokens",
        "batch company",
        "padding",
        "weight sync",
        "learning rate 0",
        "gradient",
    }


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param((), id="all"),
        pytest.param(
            ("algorithm.diffusion_steps_per_update=2", "algorithm.diffusion_shrink=2"),
            id="some",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_masked_diffusion_checkpoint_passes_every_gate_that_applies(changes):
    options = ["verify", "-c", "configs/rl/lab_lumina_dimoo.yaml", "--prompts", "2", "--json", "-q", *changes]
    result = CliRunner().invoke(cli.app, options)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["passed"], document["family"], document["sampler"]) == (True, "lumina_dimoo", "torch")
    rows = document["gates"]
    assert {row["gate"] for row in rows if row["verdict"] == "not applicable"} == {"greedy tokens"}
    applied = {(row["gate"], row["dtype"]) for row in rows if row["verdict"] == "pass"}
    for gate in ("layout", "agreement", "batch company", "padding", "weight sync", "learning rate 0", "gradient"):
        assert (gate, "float32") in applied


def test_a_failed_gate_is_in_the_table_and_in_the_exit_code(random_janus, monkeypatch):
    build = verify.build_sampler
    monkeypatch.setattr(verify, "build_sampler", lambda *arguments: Colder(build(*arguments)))
    monkeypatch.setattr(verify, "get_args", lambda _: ("float32",))
    monkeypatch.setattr(verify, "LEARNING_GATES", ())
    result = CliRunner().invoke(cli.app, settings_of(random_janus))
    assert result.exit_code == 1, result.output
    assert result.stdout.count("FAIL [1]") == 4
    assert "[1] agreement: sampler and learner hold different laws" in result.stdout
    assert "cannot be trained on as it is: 8 pass, 4 fail, 2 information" in result.stdout


@pytest.mark.parametrize(
    ("file", "words"),
    [("model.safetensors", "whole safetensors file"), ("tokenizer.json", "expected a checkpoint that loads")],
)
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, file, words, capsys):
    folder = write_janus(tmp_path / "checkpoint")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", "--checkpoint", str(folder), "rollout.backend=torch"])
    assert ended.value.code == 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unirl: error")]
    assert words in line
    assert str(folder) in line


def test_pairs_and_rewards_may_stay_open_and_the_checkpoint_may_not(capsys):
    recipe = "configs/rl/janus_pro_1b.yaml"
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", "-c", recipe])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "model.path (???) must be given; add --checkpoint PATH" in shown
    assert "data.pairs" not in shown


def test_the_sampler_is_vllm_where_the_family_has_one():
    assert verify.settings_for(RlConfig(), LAB).rollout.backend == "vllm"
    other = RlConfig(model=ModelConfig(family="lumina_dimoo"))
    assert verify.settings_for(other, LAB).rollout.backend == "torch"


@pytest.mark.slow
def test_the_lab_checkpoint_passes_with_vllm(capsys):
    assert verify.main(RlConfig(), num_prompts=4) == 0
    assert "sampler vllm" in capsys.readouterr().out
