"""Tables of text."""

from diffperception.table import format_table


def test_numbers_stand_at_the_right_and_words_at_the_left() -> None:
    rows = [("cell", 1, "10.25 ± 0.10"), ("platelet", 20, None), ("", 3, "-1.00")]
    assert format_table(rows, ["class", "objects", "AP"]).split("\n") == [
        "class     objects            AP",
        "cell            1  10.25 ± 0.10",
        "platelet       20             -",
        "                3         -1.00",
    ]


def test_no_rows_and_columns_without_a_title() -> None:
    assert format_table([], ["class", "AP"]) == "class  AP"
    assert format_table([("FID", "3.5", "lower")], ["", "", ""]) == "FID  3.5  lower"


def test_markdown() -> None:
    assert format_table([("ours", "1.5"), ("theirs", 22)], ["", "mIoU"], markdown=True).split("\n") == [
        "|        | mIoU |",
        "| ------ | ---: |",
        "| ours   |  1.5 |",
        "| theirs |   22 |",
    ]
