"""Short questions of fact for pretrained models, each with one word or number as its answer. They are finite: which of
them a model knows is for whoever builds with it to find out. Split by instance, as in `modalities.tasks`."""

from modalities.tasks import Question

CAPITALS = """
France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Portugal: Lisbon, Greece: Athens, Austria: Vienna, Poland:
Warsaw, Hungary: Budapest, Sweden: Stockholm, Norway: Oslo, Denmark: Copenhagen, Finland: Helsinki, Ireland: Dublin,
Belgium: Brussels, Russia: Moscow, Ukraine: Kyiv, Turkey: Ankara, Japan: Tokyo, China: Beijing, South Korea: Seoul,
North Korea: Pyongyang, India: New Delhi, Pakistan: Islamabad, Bangladesh: Dhaka, Nepal: Kathmandu, Thailand: Bangkok,
Vietnam: Hanoi, Indonesia: Jakarta, the Philippines: Manila, Malaysia: Kuala Lumpur, Mongolia: Ulaanbaatar, Iran:
Tehran, Iraq: Baghdad, Syria: Damascus, Lebanon: Beirut, Jordan: Amman, Israel: Jerusalem, Saudi Arabia: Riyadh,
Afghanistan: Kabul, Egypt: Cairo, Libya: Tripoli, Tunisia: Tunis, Morocco: Rabat, Algeria: Algiers, Nigeria: Abuja,
Ghana: Accra, Kenya: Nairobi, Ethiopia: Addis Ababa, Uganda: Kampala, Rwanda: Kigali, Somalia: Mogadishu, Zambia:
Lusaka, Zimbabwe: Harare, Angola: Luanda, Senegal: Dakar, Sudan: Khartoum, Canada: Ottawa, the United States:
Washington, Mexico: Mexico City, Cuba: Havana, Jamaica: Kingston, Haiti: Port-au-Prince, Brazil: Brasilia, Argentina:
Buenos Aires, Chile: Santiago, Peru: Lima, Colombia: Bogota, Venezuela: Caracas, Bolivia: La Paz, Ecuador: Quito,
Uruguay: Montevideo, Paraguay: Asuncion, Australia: Canberra, New Zealand: Wellington, Iceland: Reykjavik, Scotland:
Edinburgh, Wales: Cardiff, England: London, the United Kingdom: London, Croatia: Zagreb, Serbia: Belgrade, Bulgaria:
Sofia, Romania: Bucharest, Slovakia: Bratislava, Slovenia: Ljubljana, Estonia: Tallinn, Latvia: Riga, Lithuania:
Vilnius, Belarus: Minsk, Georgia: Tbilisi, Armenia: Yerevan, Azerbaijan: Baku, Albania: Tirana, Cyprus: Nicosia,
Malta: Valletta, Switzerland: Bern, the Netherlands: Amsterdam, the Czech Republic: Prague, Cambodia: Phnom Penh,
Laos: Vientiane, Sri Lanka: Colombo, Yemen: Sanaa, Qatar: Doha, Oman: Muscat, Bahrain: Manama, Kuwait: Kuwait City,
Guatemala: Guatemala City, Honduras: Tegucigalpa, Nicaragua: Managua, Panama: Panama City, Costa Rica: San Jose,
California: Sacramento, Texas: Austin, Florida: Tallahassee, Hawaii: Honolulu, Alaska: Juneau, Colorado: Denver,
Massachusetts: Boston, Arizona: Phoenix, Ohio: Columbus, Oregon: Salem, Tennessee: Nashville
"""
OPPOSITES = """
hot: cold, big: small, up: down, left: right, black: white, good: bad, fast: slow, high: low, day: night, happy: sad,
old: new, young: old, rich: poor, hard: soft, light: dark, long: short, full: empty, open: closed, early: late, near:
far, wet: dry, strong: weak, true: false, love: hate, war: peace, life: death, win: lose, push: pull, come: go, give:
take, buy: sell, front: back, inside: outside, top: bottom, north: south, east: west, begin: end, start: stop, first:
last, always: never, before: after, clean: dirty, cheap: expensive, easy: difficult, loud: quiet, heavy: light, thick:
thin, wide: narrow, deep: shallow, sweet: sour, sharp: dull, smooth: rough, tall: short, fat: thin, brave: cowardly,
kind: cruel, polite: rude, lucky: unlucky, safe: dangerous, simple: complex, ugly: beautiful, asleep: awake, alive:
dead, friend: enemy, male: female, boy: girl, man: woman, king: queen, husband: wife, brother: sister, father: mother,
son: daughter, uncle: aunt, summer: winter, sunrise: sunset, yes: no, laugh: cry, float: sink, accept: reject, arrive:
depart, ask: answer, increase: decrease, success: failure, victory: defeat, question: answer, teacher: student,
public: private, modern: ancient, positive: negative, maximum: minimum, major: minor, odd: even, plural: singular,
more: less, many: few, all: none, everything: nothing, noisy: quiet, bright: dim, fresh: stale, guilty: innocent,
forget: remember, find: lose, create: destroy, attack: defend, import: export, entrance: exit, horizontal: vertical,
internal: external, legal: illegal, possible: impossible, visible: invisible, honest: dishonest, patient: impatient,
regular: irregular, correct: incorrect, perfect: imperfect, complete: incomplete, known: unknown, fair: unfair, tie:
untie, lock: unlock, agree: disagree, appear: disappear, optimist: pessimist, freeze: melt, heaven: hell, wise:
foolish, generous: stingy, lend: borrow, raise: lower
"""
SYMBOLS = """
gold: Au, silver: Ag, iron: Fe, copper: Cu, oxygen: O, hydrogen: H, carbon: C, nitrogen: N, helium: He, neon: Ne,
sodium: Na, potassium: K, calcium: Ca, magnesium: Mg, zinc: Zn, lead: Pb, tin: Sn, mercury: Hg, sulfur: S, phosphorus:
P, chlorine: Cl, iodine: I, fluorine: F, aluminum: Al, silicon: Si, nickel: Ni, lithium: Li, uranium: U, platinum: Pt,
cobalt: Co, titanium: Ti, argon: Ar, bromine: Br, boron: B, radium: Ra, tungsten: W, chromium: Cr, manganese: Mn,
barium: Ba, krypton: Kr, xenon: Xe
"""
PLURALS = """
mouse: mice, foot: feet, tooth: teeth, child: children, man: men, woman: women, goose: geese, person: people, ox:
oxen, knife: knives, wife: wives, leaf: leaves, wolf: wolves, life: lives, half: halves, box: boxes, bus: buses, city:
cities, baby: babies, lady: ladies, dog: dogs, cat: cats, book: books, tree: trees, house: houses, car: cars, apple:
apples, potato: potatoes, tomato: tomatoes, hero: heroes, class: classes, dish: dishes, watch: watches, fox: foxes,
country: countries, family: families, story: stories, key: keys, boy: boys, day: days, toy: toys, bird: birds, horse:
horses, sheep: sheep, fish: fish, deer: deer, cow: cows, chair: chairs, table: tables, window: windows, river: rivers,
mountain: mountains, flower: flowers, teacher: teachers, king: kings, cherry: cherries, puppy: puppies, butterfly:
butterflies, church: churches, brush: brushes, peach: peaches, glass: glasses, shelf: shelves, thief: thieves, loaf:
loaves, calf: calves, elf: elves, cactus: cacti, pencil: pencils, door: doors, road: roads, ship: ships, star: stars,
song: songs, hand: hands, eye: eyes, ear: ears
"""
LANGUAGES = """
France: French, Germany: German, Italy: Italian, Spain: Spanish, Portugal: Portuguese, Brazil: Portuguese, Mexico:
Spanish, Argentina: Spanish, Chile: Spanish, Peru: Spanish, Colombia: Spanish, Cuba: Spanish, Greece: Greek, Poland:
Polish, Hungary: Hungarian, Sweden: Swedish, Norway: Norwegian, Denmark: Danish, Finland: Finnish, Russia: Russian,
Ukraine: Ukrainian, Turkey: Turkish, Japan: Japanese, China: Chinese, Korea: Korean, Thailand: Thai, Vietnam:
Vietnamese, Indonesia: Indonesian, Iran: Persian, Iraq: Arabic, Egypt: Arabic, Morocco: Arabic, Syria: Arabic, Israel:
Hebrew, England: English, Australia: English, Austria: German, Romania: Romanian, Bulgaria: Bulgarian, Iceland:
Icelandic, Croatia: Croatian, Albania: Albanian, Mongolia: Mongolian, Nepal: Nepali, Pakistan: Urdu, Ireland: Irish,
Venezuela: Spanish, Ecuador: Spanish, Bolivia: Spanish
"""
LISTED = {  # family: (wording, pairs)
    "capital": ("What is the capital of {}?", CAPITALS),
    "opposite": ("What is the opposite of {}?", OPPOSITES),
    "symbol": ("What is the chemical symbol for {}?", SYMBOLS),
    "plural": ("What is the plural of {}?", PLURALS),
    "language": ("What language is spoken in {}?", LANGUAGES),
}


def facts() -> list[Question]:
    """Every question, in a fixed order."""
    return [fact(family, wording, *pair) for family, (wording, text) in LISTED.items() for pair in pairs(text)]


def pairs(text: str) -> list[tuple[str, str]]:
    """ "France: Paris, Italy: Rome" as a list of pairs."""
    return [(asked, answer) for asked, answer in (item.split(": ") for item in " ".join(text.split()).split(", "))]


def fact(family: str, wording: str, asked: str, answer: str) -> Question:
    return Question(family, f"{family} {asked}", wording.format(asked), answer, answer)
