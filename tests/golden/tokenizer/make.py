"""Makes the golden token rows, and the tables by which the tokenizer recognises mojibake: run it in this folder.

Made with open_clip 3.3.0 (SimpleTokenizer, its default cleaning), ftfy 6.3.1, Python 3.11. Tolerance: none, tokens are equal.

`strings.json` holds pairs of a string and its tokens, start and end included, however many. `batch.json` holds pairs of a long string and its row of
77, cut and padded.
`models/assets/ftfy/tables.json` holds the data of ftfy (Apache-2.0, by Robyn Speer; its licence lies beside it): the pattern of unlikely sequences,
the clues of double-encoded UTF-8 and the upper halves of ten one-byte encodings.
"""

import json
import random

import open_clip
from ftfy.badness import BADNESS_RE
from ftfy.chardata import CHARMAP_ENCODINGS, UTF8_CLUES

ASSETS = "../../../models/assets/ftfy/tables.json"


def plain_pattern(verbose):
    """A verbose pattern of Python without its spaces and comments, escaped for Rust's classes."""
    out, in_class, in_comment, escaped = [], False, False, False
    for char in verbose:
        if in_comment:
            in_comment = char != "\n"
        elif escaped:
            # Python counts four control characters among the spaces, Rust does not.
            out.append("s\\x1c-\\x1f" if char == "s" and in_class else char)
            escaped = False
        elif char == "\\":
            out.append(char)
            escaped = True
        elif in_class:
            out.append("\\" + char if char in "[&~" else char)
            in_class = char != "]"
        elif char == "#":
            in_comment = True
        elif not char.isspace():
            out.append(char)
            in_class = char == "["
    return "".join(out)


def make_tables():
    tables = {
        "badness": plain_pattern(BADNESS_RE.pattern),
        "clues": dict(UTF8_CLUES),
        "encodings": [[name, bytes(range(0x80, 0x100)).decode(name)] for name in CHARMAP_ENCODINGS],
    }
    with open(ASSETS, "w") as file:
        json.dump(tables, file, ensure_ascii=True, indent=1)
        file.write("\n")


NAMES = """person|bicycle|traffic light|hot dog|teddy bear|hair drier|aerosol can/spray can|air conditioner|alcohol/alcoholic beverage|alligator/gator|
almond|ambulance|amplifier|anklet/ankle bracelet|apple|applesauce|apricot|baby buggy/baby carriage/perambulator/pram/stroller|bagel/beigel|
band aid|barrette|beret|bow-tie/bowtie|brassiere/bra/bandeau|bulletproof vest|café|cappuccino/coffee cappuccino|checkbook/chequebook|crème brûlée|
doughnut/donut|dress hat/high hat/opera hat/silk hat/top hat|earphone/earpiece/headphone|eclair|flip-flop (sandal)|frying pan/frypan/skillet|
gull/seagull|hair dryer/blow dryer|jet plane/jet-propelled plane|kilt|lamb (animal)|mallard|Mason jar|necktie/tie (necktie)|omelet/omelette|
Oreo|pajamas/pyjamas|pita (bread)/pocket bread|puffin|quesadilla|Rollerblade|saltshaker|Sharpie|Tabasco sauce|T-shirt|Ziploc bag""".replace("\n", "").split("|")

HARD = [
    "", " ", "a", "A", "é", "e\u0301", "E\u0301COLE", "naïve façade", "Ångström", "A\u030a", "smörgåsbord", "ﬁsh ﬂuﬀy oﬃce baﬄe ﬆone", "Ĳsselmeer ĳs",
    "ŉ boom", "Ǆ ǅ ǆ Ǉ ǈ ǉ Ǌ ǋ ǌ Ǳ ǲ ǳ", "ＬＯＵＤ　ＮＯＩＳＥＳ", "Ｕﾀｰﾝ", "ｶﾞｷﾞｸﾞ", "￠￡￢￣￤￥￦", "İstanbul", "ISTANBUL", "ΟΔΥΣΣΕΥΣ", "ΣΑΣ ΑΣ. Σ", "straße STRASSE ẞ",
    "ſhip 'ſ it'ſ", "K\u212a Å\u212b", "don't can't I'm we're they've she'll he'd it's", "DON'T CAN'T I'M WE'RE", "don’t ‘quote’ “double” „low‟ ‛rev", "rock 'n' roll",
    "''s 'sa 'llama 'tis", "dogs' bowls", "'re 're're", "`back` ´acute´ ʼmod", "a photo of a {}.", "a photo of a dog.", "itap of a cat!", "12345", "1,234.5", "3rd 4x4 50%", "½ ¼ ² ³ ①",
    "٣٤٥ ४५ 五", "Ⅷ ⅷ", "hello\tworld", "hello\nworld", "hello\r\nworld\rx", "  many   spaces  ", "a\u00a0b", "a\u2003b\u2009c", "a\u200bb", "a\u200db\u200c", "a\u2028b\u2029c", "a\u0085b",
    "a\x00b\x01c", "a\x0bb\x0cc", "a\x1cb\x1dc\x1ed\x1fe", "bell\x07", "del\x7f", "\ufeffbom", "obj\ufffcect", "int\ufff9er\ufffa\ufffb", "\u206aold\u206f", "soft\u00adhyphen",
    "\x1b[36;44mI'm blue\x1b[0m", "\x1b[31mred", "\x1b[m x", "\x1b[1;2;3Hx", "33[1mfake",
    "😀", "😀😃 smile 😀", "👨‍👩‍👧‍👦 family", "👍🏽 thumbs", "🇫🇷🇯🇵", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "❤️ heart ❤", "☃ snowman ☃︎", "©®™", "→←⇒", "∑∫√∞≠", "₿€£¥",
    "日本語", "日本語のテキスト、句読点。", "中文字符测试", "한국어 텍스트", "한국어", "ภาษาไทย", "हिन्दी", "العربية", "עברית", "ελληνικά", "русский язык", "Ёлка ёж", "українська ґ",
    "tiếng Việt", "Þórr ðæt", "Łódź", "ŠĐČĆŽ", "ÇĞİÖŞÜ çğıöşü", "a dog 狗 a cat 猫", "x̲y̲", "Z͑ͫ̓a̴l̷g̶o̸", "α\u0345 x\u0345y !\u0345?",
    "&amp;", "&amp;amp;", "&amp;amp;amp;", "&amp;amp;amp;amp;", "&lt;b&gt;", "<b>&amp;</b>", "<&eacute;>", "AT&T", "AT&amp;T", "P&EACUTE;REZ", "P&eacute;rez", "&ntilde; &Ntilde; &NTILDE; &nTILDE;",
    "BUNDESSTRA&SZLIG;E", "&nbsp;", "a&nbsp;b", "&hellip;", "&notit;", "&not it", "this&not that", "&copy 2020", "&copy;", "&COPY", "&#65;", "&#x41;", "&#X41", "&#65", "&#0;", "&#x80;", "&#x81;", "&#150;",
    "&#xD800;", "&#x110000;", "&#99999999999999999999;", "&#xFFFFFFFFFFFFFFFFFFFF", "&#1;", "&#xFDD0;", "&#x1F600;", "&#128512;", "&;", "&", "&&", "&&amp;", "&#;", "&#x;", "&#xg;", "& amp;", "&unknown;", "&ampamp;", "&ltx&gty",
    "&Jscr;ohn &HilbertSpace;ancock", "&checkmark;", "&fjlig;", "&NotEqualTilde;", "&bne;", "&lt;script&gt;alert(&quot;hi&quot;)&lt;/script&gt;", "&apos;s it&#39;s it&#x2019;s", "&CounterClockwiseContourIntegral;",
    "caf&eacute", "caf&eacutee", "&ETH &eth &THORN", "&amp;eacute;", "&frac12; cup", "&AMP;&amp&AMP", "line<br>\nnext &amp;amp; &eacute;", "&eacute;\n<b>&eacute;\n&amp;lt;", "&quot;quoted&quot;",
    "cafÃ©", "schÃ¶n", "voilÃ le travail", "Ã la mode", "Ã quel point", "doesnâ€™t", "â€œquotedâ€\x9d", "â€œ like this â€�", "â€” dash â€“", "âœ” No problems", "&macr;\\_(ã\x83\x84)_/&macr;",
    "Broken text&hellip; it&#x2019;s ﬂubberiﬁc!", "uÌˆnicode", "LÃ¤ngÃ¼", "Â£100", "Â©", "a Â b", "Â ", "Ã\xa0", "RUF MICH ZURÃœCK", "BlÃ¥bÃ¦rsyltetÃ¸y", "Ãàö", "NestlÃ©", "MÃ‰XICO", "l’humanitÃ©",
    "ä½\xa0å¥½", "ä¸­æ–‡", "æ—¥æœ¬èªž", "ÐŸÑ€Ð¸Ð²ÐµÑ‚", "РџСЂРёРІРµС‚", "Ñ\x80ÑƒÑ\x81Ñ\x81ÐºÐ¸Ð¹", "ÎšÎ±Î»Î·Î¼Î­Ï\x81Î±", "ïŋ½ï¿½", "ï»¿bom", "ðŸ˜€", "ðŸ˜‚ lol ðŸ’©", "ðŸ\x98\x80", "Ã¢â‚¬â„¢", "ÃƒÂ©", "ÃƒÆ’Ã‚Â©", "\xed\xa0\xbd\xed\xb8\x80",
    "\xc3\xa9t\xc3\xa9", "\xe2\x80\x99s", "it\x92s \x93quoted\x94 \x85", "\x80 euro", "\x81\x8d\x8f", "caf\xe9 \x96 bar", "√©t√©", "‚Äôs", "‚Äúmac‚Äù", "Â¬£", "├⌐", "Γçô", "Ã©Ã¨Ãª", "fÃ cil", "às Ã s", "Ã§a va",
    "D\u00c3\u00bcsseldorf \u00e2\u20ac\u201c K\u00c3\u00b6ln", "Å‚Ã³dÅº", "Å koda", "Ä\x8dau", "Äiau Ä\u008d", "Ġ Ċ", "Ã‚Â", "Ã¯Â¿Â½", "â„¢ â‚¬ â€¢ â€¦", "â€¢ item", "â\x80\x99", "â ’ x", "Ð¢ÐµÑ�Ñ‚", "вЂњцитатаВ»", "Ø§Ù„Ø¹Ø±Ø¨ÙŠØ©", "à¸ à¸²", "ã\x81\x82",
    "œÃ©", "Ã½ Ã¾", "aÌ€", "N\u00c3\u0083\u00c2\u00a9", "Àé", "Ôú ÿ", "É¡", "ÄÅ", "É¢ ÄŸ", "\xc0\x80", "A\xc0\x80\xc3\xa9", "\xe3\x80\x80\xe3 \x81", "¿Qué? ¡Sí!", "«guillemets»", "º ª", "naïve Ãœber", "ÃœBER", "Ã…ngstrÃ¶m", "¶ § ¤", "Ãƒ",
    "<start_of_text>", "<end_of_text>", "<|startoftext|>", "a<end_of_text>b", "<START_OF_TEXT> x", "<start_of_text", "_underscore_ snake_case", "camelCase", "http://example.com/a?b=c&d=e#f", "me@example.com", "#hashtag @user", "a/b\\c|d", "(a) [b] {c}",
    "...", "!!!???", "----", "=== ***", "~!@#$%^&*()_+", "C++ C# .NET", "100% cotton", "$5.99", "e.g., i.e.", "U.S.A.", "Mr. O'Neil's", "x'd y'LL", "5'10\"", "naïve—dash–en", "\\n \\u00e9 \\x41",
    "antidisestablishmentarianism", "pneumonoultramicroscopicsilicovolcanoconiosis", "supercalifragilisticexpialidocious " * 3, "a " * 100, "é" * 50, "😀" * 30, "x" * 300, "word " * 74 + "end", "word " * 75 + "end", "word " * 76 + "end",
    "1" * 100, "日" * 60, "aaaaaaaaaaaaaaaa", "abababababab", "hahahahaha", "mississippi", "zzzzzzzzzzz", "!" * 90, "&amp;" * 40, "Ã©" * 40, "thethethe", "ing ing inging", "\t\n\r ", "\u3000", "\ufffd", "? \ufffd ?", "\U0010ffff", "\ue000", "\u0378",
]  # fmt: skip


def mixed(rng, n):
    """Strings of random pieces: what a hand would not think of."""
    latin = "The quick brown fox naïve Über garçon ÅÄÖ señor".split()
    pieces = [*NAMES, *latin, "&amp;", "&eacute;", "&lt", "'s", "’s", "\x85", "\u2014", "😀", "狗", "É", "ß", "..", "!", "\t", "  ", "\n", "<", "7", "42nd", "ﬁ", "\u0301"]

    def garble(text):
        encoding = rng.choice(["latin-1", "sloppy-windows-1252", "sloppy-windows-1251", "sloppy-windows-1250", "macroman", "cp437", "iso-8859-2", "sloppy-windows-1253", "sloppy-windows-1254", "sloppy-windows-1257"])
        return text.encode("utf-8").decode(encoding)

    for _ in range(n):
        text = " ".join(rng.choice(pieces) for _ in range(rng.randint(1, 8)))
        yield rng.choice([str, str, str.upper, garble, garble])(text) + rng.choice(["", ".", "!", " \x00"])


def main():
    make_tables()
    rng = random.Random(0)
    templates = ["a photo of a {}.", "a close-up photo of the {} in the scene"]
    strings = HARD + [template.format(name.replace("_", " ")) for name in NAMES for template in templates]
    strings = list(dict.fromkeys(strings))
    strings += mixed(rng, max(100, 500 - len(strings)))
    tokenizer = open_clip.SimpleTokenizer()
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    rows = [[text, [start, *tokenizer.encode(text), end]] for text in strings]
    print(len(rows), "strings")
    with open("strings.json", "w") as file:
        json.dump(rows, file, separators=(",", ":"))
        file.write("\n")
    short = [text for text, tokens in rows if len(tokens) > 70][:12]
    with open("batch.json", "w") as file:
        json.dump([[text, row] for text, row in zip(short, tokenizer(short).tolist())], file, separators=(",", ":"))
        file.write("\n")


main()
