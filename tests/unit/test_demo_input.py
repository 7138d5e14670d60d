import bz2

from owl_deploy import demo_input

PAGE = (
    """<page><title>{title}</title><ns>{ns}</ns><revision><text>{text}</text></revision></page>"""
)
WORDS = "The mill stands by the river and has done so for years. " * 25


def dump(tmp_path, *pages):
    text = "<mediawiki xmlns='http://www.mediawiki.org/xml/export-0.3/'>" + "".join(pages)
    path = tmp_path / "dump.xml.bz2"
    path.write_bytes(bz2.compress((text + "</mediawiki>").encode()))
    return path


def page(text, ns=0):
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return PAGE.format(title="x", ns=ns, text=escaped)


def test_markup_goes_and_words_stay(tmp_path):
    source = (
        "'''Mills''' ({{lang|de}}) are [[water mill|old]] mills.<ref>Smith</ref>\n"
        "{| class=x\n| cell\n|}\n[[File:mill.jpg|thumb|A [[mill]] wheel]]\n" + WORDS
    )
    (found,) = demo_input._articles(dump(tmp_path, page(source)))
    assert found.startswith("Mills are old mills.")
    for gone in ("Smith", "cell", "mill.jpg", "wheel", "{", "[", "'''"):
        assert gone not in found


def test_redirects_stubs_and_other_spaces_are_left_out(tmp_path):
    pages = [page("#REDIRECT [[x]] " + WORDS), page("Short."), page(WORDS, ns=1), page(WORDS)]
    assert len(demo_input._articles(dump(tmp_path, *pages))) == 1


def test_every_fifth_article_evaluates(tmp_path):
    path = dump(tmp_path, *(page(f"Article {index}. " + WORDS) for index in range(6)))
    demo_input._write_texts(path, tmp_path)
    evaluation = (tmp_path / demo_input.EVALUATION).read_text()
    calibration = (tmp_path / demo_input.CALIBRATION).read_text()
    assert "Article 4." in evaluation
    assert "Article 4." not in calibration
    assert all(f"Article {index}." in calibration for index in (0, 1, 2, 3, 5))
