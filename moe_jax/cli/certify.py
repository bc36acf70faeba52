"""`moe-jax certify`."""

from moe_jax.cli.options import Json, check_range, checked_run, print_json, starting
from moe_jax.config import PresetName
from moe_jax.config.presets import preset as preset_named
from moe_jax.config.presets import with_vocabulary
from moe_jax.runs.catalog import title
from moe_jax.system.terminal import say, working

TRIED = (
    "Tried: one token is changed at a time, and every bit of the earlier outputs is compared. The model computes in "
    "float32 on one device, with random inputs. It trains with half of the usual slots, so that choices are dropped; "
    "it evaluates; and it reads prompts and goes on, with other tokens behind the prompt. Then the compiled layer and "
    "training step are read: the exact number of their operations, and the precision of the router. The probabilities "
    "and gates of every router are compared with float64."
)
NOT_TRIED = (
    "Not tried: other inputs, other lengths, other number formats, several texts that are written together, and "
    "gradients. Such a test can find a leak. It cannot prove that there is none."
)


def certify(preset: PresetName = "nano", run: str = "", batch_size: int = 2, json: Json = False) -> int:
    """Test claims about a model: causality, exact arithmetic of compiled programs, and number of compilations.

    The exit status is 1 if a certificate fails. The last line of the output is JSON if it is asked for, or if the
    output is a file or a pipe.

    Args:
        preset: The model to test, with its initial parameters.
        run: Folder of a run. Its model and its trained parameters are tested instead.
        batch_size: Sequences of the training step that is compiled and run.
    """
    check_range("--batch-size", batch_size, 1, 4096)
    folder = checked_run(run) if run else None
    what = f"run {title(folder)}" if folder else f"preset {preset}, initial parameters"
    with starting(f"loading {what}"):
        from moe_jax.certify.model import certify as certificates
        from moe_jax.certify.model import initial_params
        from moe_jax.runs.load import open_run

        if folder:
            opened = open_run(folder)
            config, params = opened.config, opened.params
        else:
            config = with_vocabulary(preset_named(preset))
            params = initial_params(config)
    say(f"certificates of {what}", TRIED, NOT_TRIED, "")
    remaining, results = certificates(config, params, batch_size), []
    while True:
        with working(f"testing claim {len(results) + 1}"):
            certificate = next(remaining, None)
        if certificate is None:
            break
        results.append(certificate)
        say(f"{'pass' if certificate.passed else 'FAIL'}  {certificate.title or certificate.name}")
        say(f"      {certificate.found}", f"      asked: {certificate.asked}")
    failed = [c.name for c in results if not c.passed]
    say(f"\n{len(results)} claims, {len(failed)} failed")
    results = [c._asdict() for c in results]
    print_json({"certificates": len(results), "failed": failed, "results": results}, json)
    return 1 if failed else 0
