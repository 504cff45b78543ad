"""Space of an `evaluate` module: type its arguments as JSON, read its results."""

import json
from pathlib import Path

import evaluate
import gradio as gr


FOLDER = Path(__file__).parent
(MODULE,) = (path for path in FOLDER.glob("*.py") if path != Path(__file__))
EXAMPLE = json.loads((FOLDER / "example.json").read_text(encoding="utf-8"))


def compute(arguments: str) -> dict:
    """
    Compute the metric.

    Args:
        arguments (`str`):
            JSON object with the arguments of `compute`.

    Returns:
        `dict`: Results.

    Raises:
        `gradio.Error`: If the text is no JSON object, or the metric cannot be computed.
    """
    try:
        # Loaded anew: what a failed call has read must not count in the next one.
        return evaluate.load(str(MODULE), keep_in_memory=True).compute(**json.loads(arguments))
    except (TypeError, ValueError) as error:
        raise gr.Error(str(error)) from error


demo = gr.Interface(
    fn=compute,
    inputs=gr.Code(value=json.dumps(EXAMPLE, indent=1), language="json", label="Arguments"),
    outputs=gr.JSON(label="Results"),
    title=MODULE.stem,
    description=evaluate.load(str(MODULE)).description,
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch()
