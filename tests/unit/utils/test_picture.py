import re

from owl_deploy.utils import picture


def draw(axes):
    axes.plot([0, 1], [0, 1], color=picture.ACCENT, label="$x_{$ <b>")
    axes.legend()


def test_the_same_picture_gives_the_same_bytes_and_text_stays_text():
    made = picture.svg(draw)
    assert made == picture.svg(draw)
    assert ">$x_{$ &lt;b&gt;</text>" in made
    assert picture.ACCENT in made
    assert re.search(r'<svg[^>]* width="', made)


def test_on_a_page_it_has_the_pages_inks_and_width():
    made = picture.svg(draw, page=picture.PAGE)
    assert made.startswith("<svg")
    head = made.split(">")[0]
    assert "width=" not in head
    assert "height=" not in head
    assert "viewBox=" in head
    assert "var(--accent)" in made
    assert not any(color in made for color in picture.PAGE)


def test_the_checkpoints_picture_has_the_whole_beside():
    made = picture.sparsity_by_block([0.6, 0.8], [3.0, None], ("owl", 0.7))
    assert "uniform, 70.0 %" in made
    assert "outlier ratio" in made
    without = picture.sparsity_by_block([0.6, 0.8], [None, None])
    assert "outlier ratio" not in without


def test_a_cell_for_every_linear_and_a_line_for_every_format():
    blocks = [
        {"attn.q_proj": (8, 0.0), "mlp.up_proj": (4, 0.5)},
        {"attn.q_proj": (4, 0.0), "mlp.up_proj": (4, 0.5)},
        {"mlp.up_proj": (8, 0.0)},
    ]
    made = picture.formats_by_linear(blocks)
    for label in ("8 bits", "4 bits", "4 bits, 50% removed", "q_proj", "up_proj", "block"):
        assert f">{label}<" in made
    assert ">8 bits, " not in made
    assert made == picture.formats_by_linear(blocks)
    cells = re.findall(r"opacity: ?([\d.]+)", made)
    assert {float(one) for one in cells} >= {0.5, 0.25}


def test_the_less_is_removed_the_darker():
    blocks = [{"attn.q_proj": 0.7, "attn.v_proj": 0.2}, {"attn.q_proj": 0.45}]
    made = picture.sparsity_by_linear(blocks)
    shades = [float(one) for one in re.findall(r"opacity: ?([\d.]+)", made)]
    for sparsity, shade in ((0.2, 1.0), (0.45, 0.55), (0.7, 0.1)):
        assert f">{sparsity:.0%} removed<" in made
        assert shade == 1.0 or shade in shades
    assert made == picture.sparsity_by_linear(blocks)
    assert ">50% removed<" in picture.sparsity_by_linear([{"q_proj": 0.5}, {}])
