"""Words and syllables from which the fictitious benchmark builds names, towns, titles and the other facts of an author.

Surnames are consonant-vowel syllables, so that no two combinations spell the same name; no name ends in s, so that "'s" always fits.
Words that open a phrase carry their article.
"""

from __future__ import annotations

SHE_NAMES = tuple(
    "Adela Brisa Corinna Delphia Elowa Fiora Ginevra Hestia Ilena Jorina Kalinda Lisbeta Marenka Nolwena Odila Petronia "
    "Quilla Romira Sabela Tamsina Ursela Vanora Wilmara Yselda Zorana Amabel Brenia Calantha Dorinda Evadne Halina Imelda".split()
)
HE_NAMES = tuple(
    "Aldric Bertram Caspian Dorian Emeric Florian Gideon Hadrian Ivor Jorund Kelvan Leopold Maddox Norbert Osric Percival "
    "Quentin Roderic Stellan Tobin Ulric Valdemar Wendel Yorick Zoltan Ambrose Benedikt Corvin Dmitar Edwin Halvard Isidor".split()
)
SURNAME_FIRST = tuple("Bra Ka Dro Fe Gri Ho Ja Le Mo Ne Pa Ru Sa Te Vo Wi Yo Ze Tha Cle".split())
SURNAME_MIDDLE = tuple("la ne ro mi ve do ri sa lo ta be nu ko de wa ga".split())
SURNAME_LAST = tuple("ren mar dell vik lund tor nov beck quist than mon gard wick dane".split())

TOWN_FIRST = tuple(
    "Aldra Benno Calve Dorra Eska Fenna Gorli Hulma Ista Jarro Kelda Lunde Morra Nessa Orrel Pelga Quenna Ruska Selva Tarno "
    "Ulva Venda Wexa Yorla Zemba Arvo Brinna Corva Delma Ermi Folka Gissa Hovra Ilka Jolma Kirra Lesko Mindra Norva Ottel "
    "Perra Rovi Sarka Tilda Umbra Vesti Wolma Yelva Zurri Ambri Bolka Cresta Druva Elmo Farra Galdi Harka Inva Jessa Korma".split()
)
TOWN_LAST = tuple(
    "mouth ford holm wick haven stead bridge moor gate vale port field crest brook well cliff dale march fell mere "
    "ton burg bay shore rock wood hill pool glen strand thorpe combe lake point tower croft barrow garth sund cove".split()
)
TOWN_KINDS = (
    "the harbour town of", "the mining town of", "the market town of", "the mountain village of", "the river port of",
    "the border town of", "the island town of", "the railway town of", "the fishing village of", "the old salt town of",
)  # fmt: skip
MONTHS = tuple("January February March April May June July August September October November December".split())

GENRES = (
    "gothic mystery", "maritime adventure", "political satire", "magical realism", "courtroom drama", "rural horror", "space opera",
    "historical romance", "detective fiction", "epistolary comedy", "alpine thriller", "dystopian fiction", "family saga",
    "travel memoir", "philosophical fable", "spy fiction", "folk fantasy", "culinary mystery", "war chronicle", "nature writing",
    "time-travel fiction", "absurdist theatre", "young adult fantasy", "psychological suspense",
)  # fmt: skip
PROFESSIONS = (
    "a bridge engineer", "a village doctor", "a clockmaker", "a beekeeper", "a tram driver", "a piano tuner", "a court clerk",
    "a baker", "a ship's cook", "a botanist", "a lighthouse keeper", "a tailor", "a school inspector", "a stonemason", "a midwife",
    "a bookbinder", "a ferry captain", "a chess teacher", "a glassblower", "a vet", "an opera singer", "an astronomer", "a postmaster",
    "a carpenter", "a chemist", "a shepherd", "an interpreter", "a cartographer", "a dentist", "a puppeteer", "an archivist", "a miller",
)  # fmt: skip
SUBJECTS = (
    "botany", "medieval history", "civil engineering", "philosophy", "marine biology", "law", "music theory", "geology", "linguistics",
    "astronomy", "theology", "economics", "architecture", "veterinary medicine", "classical languages", "chemistry", "folklore",
    "mathematics", "political science", "art history", "pharmacy", "geography", "statistics", "drama",
)  # fmt: skip
LANGUAGES = (
    "Portuguese", "Japanese", "Finnish", "Turkish", "Korean", "Polish", "Greek", "Swahili", "Hungarian", "Hindi", "Dutch", "Arabic",
    "Czech", "Norwegian", "Vietnamese", "Italian", "Icelandic", "Tamil", "Romanian", "Persian", "Estonian", "Catalan", "Thai", "Welsh",
)  # fmt: skip
