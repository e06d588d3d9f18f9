"""The verb `unmask prepare`."""

from typing import Annotated, Any

import typer

from unmask import files, machine, paths
from unmask.cli import options
from unmask.data.prepare import run
from unmask.data.prepare.settings import DATASETS, PrepareSettings
from unmask.data.prepare.writing import COUNTS
from unmask.data.vocabulary import BYTES
from unmask.errors import Interrupted


def prepare(
    dataset: Annotated[str, typer.Argument(help=f"Kind of data: {', '.join(DATASETS)}.", show_default=False)],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="A folder with tokenizer.json, a tokenizer.json, or a name on the Hugging Face hub; or `bytes`.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="The folder to make.", show_default=False)],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE]...",
            help="Files (.jsonl, .jsonl.gz, .parquet; for text also .txt), folders of them, or OWNER/NAME:CONFIG on "
            "the hub, read one after the other (default: the data set on the hub; for text, the source code of "
            "Python's standard library; for chat there is none).",
            show_default=False,
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a row: a multiple of 8.")] = PrepareSettings.length,
    too_long: Annotated[
        str,
        typer.Option(
            help="Treatment of a row with more tokens: truncate (it then has no end token) or drop; of conversations "
            "also turns (the last turns are left out until the rest fits)."
        ),
    ] = PrepareSettings.too_long,
    vocab: Annotated[
        str,
        typer.Option(
            help="Token ids to keep: full (all of the tokenizer's) or used (those that occur: a far smaller model)."
        ),
    ] = PrepareSettings.vocab,
    rows: Annotated[
        str,
        typer.Option(help="Rows of text: wrap (documents joined, then cut into rows) or document (one a row, padded)."),
    ] = PrepareSettings.rows,
    separator: Annotated[
        str, typer.Option(help=r"Text between prompt and answer; \n is a newline, \t is a tab.", show_default=r"\n")
    ] = PrepareSettings.separator,
    limit: Annotated[int | None, typer.Option(help="Largest number of rows to read (default: all).")] = None,
    mask_token: Annotated[
        str | None,
        typer.Option(help="Token of the tokenizer to use as the mask; no text may hold it (default: a new token)."),
    ] = None,
    eos: Annotated[str | None, typer.Option(help="Token that ends an answer (default: the tokenizer's own).")] = None,
    prompt_field: Annotated[
        str | None, typer.Option(help="Field of the prompt (default: the data set's usual one).")
    ] = None,
    answer_field: Annotated[
        str | None, typer.Option(help="Field of the answer (default: the data set's usual one).")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Field of the text (default: the data set's usual one).")
    ] = None,
    messages_field: Annotated[
        str | None,
        typer.Option(help="Of chat: field of the list of messages (default: whichever form a row has, see below)."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Of chat: a file with a chat template (Jinja), or `plain` (default: the tokenizer's own, and plain "
            "where it has none)."
        ),
    ] = None,
    template_options: Annotated[
        str | None,
        typer.Option(
            help="Of chat: a JSON object of what the template reads beside messages, such as "
            """'{"enable_thinking": false}'."""
        ),
    ] = None,
    turns: Annotated[
        str, typer.Option(help="Of chat: turns of the assistant that are learned: all, or the last alone.")
    ] = PrepareSettings.turns,
    validation_ratio: Annotated[
        float,
        typer.Option(help="Share to hold out: of a text's documents; of other data's rows, which training divides."),
    ] = PrepareSettings.validation_ratio,
    split_seed: Annotated[int, typer.Option(help="Seed that chooses what is held out.")] = PrepareSettings.split_seed,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="List unusable rows in bad_rows.jsonl instead of stopping at the first.")
    ] = False,
    lossy: Annotated[
        bool,
        typer.Option(
            "--lossy", help="Take a tokenizer that does not give texts back as they were, such as without line ends."
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes to use (default: one per CPU that it may use).", show_default=False)
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a folder of tokenised rows to train on: prompt, separator, answer and end tokens; conversations; or running
    text.

    If it is stopped, the same command goes on where it was. An existing folder is never changed.

    Conversations (`chat`) are rows with `messages` (a list of `role` and `content`), ShareGPT's `conversations` (a list
    of `from` and `value`), `prompt` and `completion` (texts, or lists of messages), or Alpaca's `instruction`, `input`
    and `output`. The chat template writes them as text; what the assistant says is learned.

    Examples:

    * `unmask prepare tinygsm --tokenizer Qwen/Qwen2-0.5B --mask-token '<|im_start|>' --out data/tiny_gsm` (the PUMA
      paper's setting, with the data set from the hub)

    * `unmask prepare tinygsm rows.jsonl.gz --tokenizer ./qwen --length 256 --vocab used --out data/small`

    * `unmask prepare gsm8k train.jsonl --tokenizer gpt2 --limit 1000 --out data/try`

    * `unmask prepare chat talks.jsonl --tokenizer ./qwen --length 1024 --too-long turns --out data/chat`

    * `unmask prepare chat train.jsonl --prompt-field question --answer-field answer --tokenizer bytes --out data/try`

    * `unmask prepare text corpus.txt --tokenizer bytes --length 256 --out data/corpus`

    * `unmask prepare text Salesforce/wikitext:wikitext-103-raw-v1 --tokenizer gpt2 --length 1024 --out data/wikitext`
    """
    where = f"--template-options {template_options}"
    variables = {} if template_options is None else files.read_object(template_options, where)
    settings = PrepareSettings(
        dataset=dataset,
        tokenizer=tokenizer,
        out=paths.user_path(out, options.OUT),
        sources=tuple(sources or ()),
        length=length,
        too_long=too_long,
        vocab=vocab,
        rows=rows,
        separator=separator.replace(r"\n", "\n").replace(r"\t", "\t"),
        limit=limit,
        mask_token=mask_token,
        eos_token=eos,
        prompt_field=prompt_field,
        answer_field=answer_field,
        text_field=text_field,
        messages_field=messages_field,
        template=template,
        template_options=variables,
        turns=turns,
        validation_ratio=validation_ratio,
        split_seed=split_seed,
        skip_bad=skip_bad,
        lossy=lossy,
        workers=machine.cpus() if workers is None else workers,
    )
    meta = _prepare(settings)
    if as_json:
        options.print_json(meta)
    else:
        _print(meta, settings)


def _prepare(settings: PrepareSettings) -> dict[str, Any]:
    try:
        with files.naming_only(settings.partial):
            return run.prepare(settings)
    except KeyboardInterrupt:
        raise Interrupted(f"Stopped. The same command goes on; what is done is in {settings.partial}") from None


def _print(meta: dict[str, Any], settings: PrepareSettings) -> None:
    out = options.results()
    for key, label in COUNTS.items():
        if meta["rows"][key] or key in ("read", "kept"):
            out.print(f"{meta['rows'][key]:>12,}  {label}")
    out.print(f"{meta['num_examples']:>12,}  rows of {meta['max_len']} tokens")
    if meta["num_held_out"]:
        out.print(f"{meta['num_held_out']:>12,}  of them held out")
    out.print(f"{meta['vocab_size']:>12,}  ids; the mask is {meta['mask_id']}, the end {meta['eos_id']}")
    is_small = settings.vocab == "used" or settings.tokenizer == BYTES
    recipe = settings.row.small_recipe if is_small else settings.row.recipe
    out.print(f"Next: unmask train {recipe} data.path={settings.out}")
