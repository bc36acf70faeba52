"""The routing report: one HTML file that shows where every token of a text went, and what the experts are for.

The page is made from `page/` in this package and from `moe_jax/pages/parts/`: markup, style and scripts, inlined. It
loads nothing and sends nothing. Its content security policy allows one style and one script, by their digests, and no
network address. The page holds all the numbers that it shows as one JSON object (the element `routing-data`):

    schema            1
    run, model        names, sizes, scores; the shape of the model
    text              source; pieces (one string a token); ids; mark (places of tokens that are not shown as their own
                      text); loss (nats of the next token, one number fewer than tokens); next (the likeliest next
                      tokens: see `next_data`)
    routing           expert, gate, slot, keep: for each layer a flat list of N*K; prob: of N*E, in
                      ten-thousandths
    ablation          loss and story without each expert (see `ablation.ablation_data`), or null
    ablation_missing  why there is no ablation; empty if there is one
    attention         for each layer, head and token a flat list: steps back, percent, steps back, percent, ...
    corpus            counts on validation text (see `corpus_routing.corpus_data`), or null without such a text
    corpus_missing    why there is no validation text; empty if there is one
    specialisation    for each layer and expert, the tokens that prefer it (see `specialisation`)
                      and the kinds of tokens that prefer it (see `group_preferences`)
    training          curves of metrics.jsonl and of the saved traces (see `training_curves`)
"""

import html
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import UserError
from moe_jax.data.tokenizers import token_pieces
from moe_jax.inference.traced_pass import check_routed
from moe_jax.inspection.ablation import ablation, ablation_data
from moe_jax.inspection.corpus_routing import CORPUS_TOKENS, CorpusRouting, corpus_data, corpus_routing
from moe_jax.inspection.specialisation import group_preferences, specialisation
from moe_jax.inspection.trace import RoutingTrace, attention_data, routing_trace, trace_tokens
from moe_jax.model.costs import count_parameters, totals
from moe_jax.pages import filled, page_file, page_script, page_style, security_policy
from moe_jax.plots import load_entropy, run_figures, save_figures
from moe_jax.runs.catalog import title
from moe_jax.runs.load import LoadedRun, open_run
from moe_jax.runs.records import read_metrics, read_snapshots, read_summary
from moe_jax.system.files import json_text, write_output
from moe_jax.system.terminal import working

SCHEMA = 1
REPORT, PAGE, TEXT_PAGE = "report", "routing.html", "routing-of-a-text.html"
"""The folder of a run's report, and the page in it."""
DEFAULT_TOKENS = 512
"""Tokens of validation text that the page shows if no text is given."""
SCRIPTS = ("base", "charts", "text", "experts", "ablation", "capacity", "training", "inside", "main")
MOST_POINTS = 160
MOST_TRACES = 12
"""Most saved traces whose choices the page shows. The curves show all traces."""


def report_path(folder: Path, of_a_text: bool = False) -> Path:
    """The default path of a run's report. A report on a text of the user's does not replace the run's own."""
    return folder / REPORT / (TEXT_PAGE if of_a_text else PAGE)


def report_run(run: Path) -> list[str]:
    """Write pictures and report of a finished run into its folder `report`. Returns the lines to print.

    They say what was written, or why it was not. A missing report is no failure of the run.
    """
    lines = []
    try:
        save_figures(run_figures([run]), run / REPORT)
        lines.append(f"pictures: {run / REPORT}")
    except (UserError, OSError) as error:
        lines.append(f"pictures: {error}")
    try:
        lines.append(f"routing report: {write_report(run, report_path(run))}, to open in a browser")
    except (UserError, OSError) as error:
        lines.append(f"no routing report: {error}")
    return lines


def write_report(
    folder: Path, out: Path, *, text: str = "", step: int | None = None, json_out: Path | None = None
) -> Path:
    """Write the report of a run on `text`, or without a text on the beginning of its validation text. Returns its path.

    Raises UserError if the folder holds no run or a dense baseline, or if there is no text to show.
    """
    with working(f"routing a text through {title(folder)}"):
        run = open_run(folder, step)
        check_routed(run.config.model)
        valid, missing = _validation_tokens(run)
        if missing and valid is not None:
            print(f"warning: {missing}", file=sys.stderr)
        trace, source = _shown_text(run, text, valid, missing)
    corpus = None if valid is None else corpus_routing(run, valid)
    data = report_data(folder, run, trace, source, corpus, missing)
    write_output(out, render(data))
    if json_out is not None:
        write_output(json_out, _json(data) + "\n")
    return out


def _shown_text(run: LoadedRun, text: str, valid: np.ndarray | None, missing: str) -> tuple[RoutingTrace, str]:
    """The routing of the text that the page shows, and where the text is from."""
    if not text:
        if valid is None:
            raise UserError(f"--text: must be given: {missing}")
        source = "Validation text" + (", changed since the run was trained" if missing else "")
        return trace_tokens(run, np.asarray(valid[:DEFAULT_TOKENS], np.int32)), source
    return routing_trace(run, text), "The text that was given"


def _validation_tokens(run: LoadedRun) -> tuple[np.ndarray | None, str]:
    """The validation stream of the run, or None; and why there is none, or that the text has changed."""
    try:
        store, changed = run.validation_text(progress=False)
    except UserError as error:
        return None, f"{error}."
    return store.valid.tokens[: max(CORPUS_TOKENS, run.config.model.seq_len, DEFAULT_TOKENS)], changed


def report_data(
    folder: Path, run: LoadedRun, trace: RoutingTrace, source: str, corpus: CorpusRouting | None, missing: str
) -> dict[str, Any]:
    """Everything that the page shows, ready for JSON."""
    return {
        "schema": SCHEMA,
        "run": _run_data(folder, run),
        "model": _model_data(trace),
        "text": {
            "source": source,
            "pieces": trace.pieces,
            "ids": trace.tokens.tolist(),
            "mark": _marked(run, trace),
            "loss": _rounded(trace.loss[:-1], 3),
            "next": next_data(run, trace),
        },
        "routing": {
            "expert": _flat(trace.expert_index),
            "gate": _flat(np.round(trace.gate.astype(float), 4)),
            "slot": _flat(trace.slot),
            "keep": _flat(trace.keep.astype(int)),
            "prob": _flat(np.rint(10_000 * trace.probs.astype(float)).astype(int)),
        },
        **_ablation(run, trace),
        "attention": attention_data(trace),
        "corpus": None if corpus is None else corpus_data(corpus),
        "corpus_missing": missing,
        "specialisation": _specialisation_data(run, corpus, trace),
        "training": training_curves(folder, run),
    }


def _ablation(run: LoadedRun, trace: RoutingTrace) -> dict[str, Any]:
    try:
        return {"ablation": ablation_data(ablation(run, trace.tokens)), "ablation_missing": ""}
    except UserError as error:
        return {"ablation": None, "ablation_missing": str(error)}


def _run_data(folder: Path, run: LoadedRun) -> dict[str, Any]:
    summary = read_summary(folder)
    counts = totals(count_parameters(run.config.model))
    return {
        "name": folder.resolve().name,
        "preset": run.config.preset,
        "step": run.checkpoint.step,
        "params_total": counts.total,
        "params_active": counts.active,
        "val_bits_per_byte": summary.get("val_bits_per_byte"),
        "val_stream": summary.get("val_stream") or ("whole" if summary.get("val_whole_stream", True) else "subset"),
        "val_drop_fraction": summary.get("val_drop_fraction"),
        "floor": summary.get("entropy_floor_bits_per_byte"),
    }


def _model_data(trace: RoutingTrace) -> dict[str, Any]:
    config = trace.config
    names = ("layers", "experts", "seq_len", "heads", "width", "expert_hidden", "dropless", "vocab_size")
    policy = ("top_k", "capacity_factor", "dispatch")
    values = {name: getattr(config, name) for name in names}
    values |= {name: getattr(config.routing, name) for name in policy}
    return values | {"capacity": trace.capacity}


def _marked(run: LoadedRun, trace: RoutingTrace) -> list[int]:
    """Positions of the tokens that are not shown as their own text: separators and parts of characters."""
    sizes = run.tokenizer.token_bytes()[trace.tokens]
    spelled = [len(piece.encode()) != size for piece, size in zip(trace.pieces, sizes, strict=True)]
    return [int(i) for i in np.flatnonzero(spelled)]


def _specialisation_data(
    run: LoadedRun, corpus: CorpusRouting | None, trace: RoutingTrace
) -> list[list[dict[str, Any]]]:
    if corpus is None:
        empty = {"tokens": [], "kinds": 0, "share": 0.0, "groups": []}
        return [[empty] * trace.config.experts for _ in range(trace.config.layers)]
    experts = specialisation(corpus)
    groups = group_preferences(corpus, run.tokenizer)
    for layer, e in np.ndindex(len(experts), trace.config.experts):
        entry = experts[layer][e]
        entry["groups"] = groups[layer][e]
        pieces = token_pieces(run.tokenizer, np.array([t["id"] for t in entry["tokens"]], np.int32))
        entry["tokens"] = [token | {"text": piece} for token, piece in zip(entry["tokens"], pieces, strict=True)]
    return experts


def next_data(run: LoadedRun, trace: RoutingTrace) -> dict[str, Any]:
    """The `width` likeliest tokens after each token but the last, as flat lists: `index` into the texts `words`, and
    `permille`. The index is -1 for an entry of the model's vocabulary that the tokenizer does not use."""
    tokens = trace.next_token[:-1]
    known = np.where(tokens < run.tokenizer.vocab_size, tokens, -1)
    ids, index = np.unique(known, return_inverse=True)
    unused = int((ids < 0).sum())
    return {
        "width": tokens.shape[1],
        "words": token_pieces(run.tokenizer, ids[unused:].astype(np.int32)),
        "index": (index.reshape(-1) - unused).tolist(),
        "permille": np.rint(1000 * trace.next_prob[:-1].astype(float)).astype(int).reshape(-1).tolist(),
    }


def training_curves(folder: Path, run: LoadedRun) -> dict[str, Any]:
    """Values by step, at most MOST_POINTS steps. `load` is [steps][L][E]; `spread` is [L][steps], the load's entropy
    divided by ln E."""
    records = read_metrics(folder)
    train = [r for r in records["train"] if r.get("load")]
    train = [train[i] for i in np.unique(np.linspace(0, len(train) - 1, MOST_POINTS).astype(int))] if train else []
    load = [r["load"] for r in train]
    return {
        "step": [r["step"] for r in train],
        **{name: [r.get(name) for r in train] for name in ("loss", "balance_loss", "drop_fraction")},
        "load": load,
        "spread": load_entropy(np.array(load)).T.tolist() if load else [],
        "val": {name: [r.get(name) for r in records["val"]] for name in ("step", "loss", "bits_per_byte")},
        "traces": _traces(folder, run),
    }


def _traces(folder: Path, run: LoadedRun) -> dict[str, Any]:
    """What the page shows of the saved traces, each of the same n tokens.

    `entropy` and `drop` [L][steps]. `same` [L][steps]: the share of tokens whose first choice is the same as in the
    trace before; null for the first trace. `shown`: the text of the tokens, and their first choices [steps][L][n] at
    no more than MOST_TRACES steps, the last one included.
    """
    saved = read_snapshots(folder)
    if not saved:
        return {"step": []}
    first = np.array([[layer[:: run.config.model.routing.top_k] for layer in trace["expert"]] for trace in saved])
    same = (first[1:] == first[:-1]).mean(2).round(4).T.tolist()
    picked = np.unique(np.linspace(0, len(saved) - 1, MOST_TRACES).astype(int))
    return {
        "step": [trace["step"] for trace in saved],
        **{name: np.array([trace[name] for trace in saved]).T.tolist() for name in ("entropy", "drop")},
        "same": [[None, *row] for row in same],
        "shown": {
            "pieces": token_pieces(run.tokenizer, np.array(saved[-1]["tokens"], np.int32)),
            "step": [saved[i]["step"] for i in picked],
            "first": first[picked].tolist(),
        },
    }


def _flat(array: np.ndarray) -> list[list[Any]]:
    """Each layer as a flat list."""
    return array.reshape(len(array), -1).tolist()


def _rounded(values: np.ndarray, digits: int) -> list[float | None]:
    return [round(float(v), digits) if np.isfinite(v) else None for v in values]


def _json(data: dict[str, Any]) -> str:
    return json_text(data, ensure_ascii=False, separators=(",", ":"))


def render(data: dict[str, Any]) -> str:
    """The page. In the data `<` is written as a JSON escape, so no text can end the data's element or begin another."""
    style = page_style(page_file("moe_jax.inspection", "page/style.css"))
    script = page_script(page_file("moe_jax.inspection", f"page/{name}.js") for name in SCRIPTS)
    parts = {
        "policy": security_policy(style, script),
        "title": html.escape(f"Routing of {data['run']['name']}"),
        "style": style,
        "script": script,
        "data": _json(data).replace("<", "\\u003c"),
    }
    return filled(page_file("moe_jax.inspection", "page/index.html"), parts)
