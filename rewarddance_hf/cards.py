"""Cards for the Hub: the templates of `hub_cards/`, filled."""

from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import CardData


def templates_folder() -> Path:
    """Folder of the templates of cards and Spaces: inside of an installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    for folder in (package / "hub_cards", package.parent / "hub_cards"):
        if (folder / "model_card.md").is_file():
            return folder
    raise FileNotFoundError(
        f"The card templates are neither in {package} nor beside it. Install rewarddance_hf again, from its wheel or in a "
        "complete checkout."
    )


def render_card(template: str, card_data: CardData, **values: Any) -> str:
    """Card from a template and the metadata of the repository. It is an error if the template asks for a value that is missing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    return environment.get_template(template).render(card_data=card_data.to_yaml(), **values)
