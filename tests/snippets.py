"""Python snippets of Markdown documents, which tests run."""

import re


def code_blocks(text: str) -> list[str]:
    """Code of all Python blocks."""
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
