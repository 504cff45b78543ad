"""Image of the tree of a search: one column for each stage, previews, rewards, and the line of the winner."""

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .result import PathNode, SearchResult


TILE = 72  # side of a preview in pixels
GAP_X, GAP_Y, MARGIN, HEAD, FOOT = 64, 10, 16, 40, 16
WINNER, KEPT, DROPPED, LOST, TEXT = "#1a7f37", "#57606a", "#d0d7de", "#cf222e", "#24292f"
PREVIEW_SIDE = 2 * TILE


def draw_tree(result: SearchResult) -> Image.Image:
    """
    Draw the tree of a search. Every node is an image of what was judged, with its reward below. Green frames and lines lead to
    the best image, dark ones to nodes that the search went on from, light ones end; red frames are paths that were lost.
    """
    depths: list[int] = []
    for node in result.nodes:
        depths.append(0 if node.parent is None else depths[node.parent] + 1)
    columns: list[list[PathNode]] = [[] for _ in range(max(depths, default=0) + 1)]
    rows: dict[int, int] = {}
    for depth, column in enumerate(columns):
        column += [node for node in result.nodes if depths[node.index] == depth]
        column.sort(key=lambda node: (-1 if node.parent is None else rows[node.parent], node.index))
        rows |= {node.index: row for row, node in enumerate(column)}
    winners = {node.index for node in result.lineage()} if result.winners else set()
    height = max(len(column) for column in columns)
    step = TILE + FOOT + GAP_Y
    size = (2 * MARGIN + len(columns) * (TILE + GAP_X) - GAP_X, 2 * MARGIN + HEAD + height * step)
    image = Image.new("RGB", (max(size[0], 420), size[1]), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=12)
    title = f"{result.method}: {result.denoiser_evaluations} denoiser evaluations, {result.verifier_calls} scores"
    draw.text((MARGIN, MARGIN), title, fill=TEXT, font=font)
    draw.text((MARGIN, MARGIN + 16), _shorten(result.prompt, image.width - 2 * MARGIN, font), fill=TEXT, font=font)

    def corner(node: PathNode) -> tuple[int, int]:
        column = columns[depths[node.index]]
        offset = (height - len(column)) * step // 2
        return (
            MARGIN + depths[node.index] * (TILE + GAP_X),
            MARGIN + HEAD + offset + rows[node.index] * step,
        )

    def color(node: PathNode) -> str:
        if node.lost:
            return LOST
        return WINNER if node.index in winners else KEPT if node.survived else DROPPED

    # Lines that matter are drawn last.
    for node in sorted(result.nodes, key=lambda node: (node.index in winners, node.survived)):
        if node.parent is not None:
            left, right = corner(result.nodes[node.parent]), corner(node)
            line = (left[0] + TILE, left[1] + TILE // 2, right[0], right[1] + TILE // 2)
            draw.line(line, fill=color(node), width=3 if node.index in winners else 1)
    for node in result.nodes:
        x, y = corner(node)
        frame = 4 if node.index in winners else 2
        draw.rectangle((x - frame, y - frame, x + TILE + frame - 1, y + TILE + frame - 1), fill=color(node))
        preview = node.preview or Image.new("RGB", (TILE, TILE), "#f6f8fa")
        image.paste(preview.resize((TILE, TILE), Image.Resampling.LANCZOS), (x, y))
        reward = "lost" if node.lost else "" if node.reward is None else f"{node.reward:.3f}"
        draw.text((x, y + TILE + 3), f"{reward} step {node.stop_step}".strip(), fill=TEXT, font=font)
    return image


def make_preview(frame: Image.Image) -> Image.Image:
    """Reduce an image to what the tree needs: a square, with white bars if the image is none."""
    side = min(max(frame.size), PREVIEW_SIDE)
    return ImageOps.pad(frame.convert("RGB"), (side, side), Image.Resampling.LANCZOS, color="white")


def _shorten(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Text on one line, cut to a width in pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
