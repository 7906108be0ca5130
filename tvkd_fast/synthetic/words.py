"""The words and facts that the synthetic tasks ask about."""


def _list(text: str) -> list[str]:
    return text.split()


def _table(text: str) -> dict[str, str]:
    """Entries `key:value`, parted by bars or ends of line."""
    return dict(entry.split(":") for entry in text.strip().replace("\n", "|").split("|"))


WORDS = _list("""
table house river bread cloud garden window yellow winter summer orange pencil basket bridge candle castle cotton
doctor engine farmer flower forest friend guitar hammer island jacket kitchen ladder lemon letter market melon mirror
monkey mother number paper planet pocket potato rabbit ribbon rocket school silver sister spring square station stone
street sugar teacher tiger tomato tower travel tunnel valley village violin wallet water whale wheel world apple
beach bird boat book camel chair cheese circle clock coffee corner desert dinner dragon eagle evening father feather
finger green happy honey horse jungle kettle lion lunch magic morning music night ocean onion picture piano pilot
pillow purple queen rain sailor salad sheep snow spoon star storm train
""")

CAPITALS = _table("""
Argentina:Buenos Aires|Australia:Canberra|Austria:Vienna|Bangladesh:Dhaka|Belgium:Brussels|Brazil:Brasilia
Bulgaria:Sofia|Cambodia:Phnom Penh|Canada:Ottawa|Chile:Santiago|China:Beijing|Colombia:Bogota|Croatia:Zagreb
Cuba:Havana|Cyprus:Nicosia|Czechia:Prague|Denmark:Copenhagen|Ecuador:Quito|Egypt:Cairo|Estonia:Tallinn
Ethiopia:Addis Ababa|Finland:Helsinki|France:Paris|Germany:Berlin|Ghana:Accra|Greece:Athens|Hungary:Budapest
Iceland:Reykjavik|India:New Delhi|Iran:Tehran|Iraq:Baghdad|Ireland:Dublin|Italy:Rome|Jamaica:Kingston|Japan:Tokyo
Jordan:Amman|Kenya:Nairobi|Latvia:Riga|Lebanon:Beirut|Libya:Tripoli|Lithuania:Vilnius|Malaysia:Kuala Lumpur
Mexico:Mexico City|Mongolia:Ulaanbaatar|Morocco:Rabat|Nepal:Kathmandu|Norway:Oslo|Oman:Muscat|Pakistan:Islamabad
Peru:Lima|Poland:Warsaw|Portugal:Lisbon|Qatar:Doha|Romania:Bucharest|Russia:Moscow|Rwanda:Kigali|Senegal:Dakar
Serbia:Belgrade|Slovakia:Bratislava|Slovenia:Ljubljana|Spain:Madrid|Sudan:Khartoum|Sweden:Stockholm|Syria:Damascus
Thailand:Bangkok|Tunisia:Tunis|Turkey:Ankara|Uganda:Kampala|Ukraine:Kyiv|Uruguay:Montevideo|Vietnam:Hanoi
Zambia:Lusaka|Zimbabwe:Harare
""")

NAMES = _list("Ada Ben Clara David Emma Felix Grace Hugo Iris Jonas Kate Leo Maria Noah Olga Paul Rosa Sam Tina Victor")

USES = _table("""
an umbrella:keeping dry in the rain|a key:opening locked doors|a pillow:resting your head|a clock:telling the time
scissors:cutting paper|a broom:sweeping the floor|a ladder:reaching high places|a kettle:boiling water
a towel:drying wet skin|soap:washing your hands|a pencil:writing and drawing|a map:finding the way|a spoon:eating soup
a fridge:keeping food cold|an oven:baking bread|a coat:staying warm outside|glasses:seeing more clearly
a camera:taking pictures|a phone:calling other people|a bed:sleeping at night|a lamp:lighting a room
a bridge:crossing a river|a wallet:carrying money|a hammer:driving nails|a saw:cutting wood|a needle:sewing clothes
a mirror:seeing your reflection|a compass:finding north|a calendar:keeping track of dates|a helmet:protecting the head
a bucket:carrying water|a net:catching fish|a stamp:sending letters|a tent:camping outdoors|a ruler:measuring lengths
a thermometer:measuring temperature|a telescope:watching distant stars|a dictionary:looking up words
gloves:keeping hands warm|a shovel:digging holes
""")

PLURALS = _table("""
child:children|mouse:mice|foot:feet|tooth:teeth|goose:geese|man:men|woman:women|person:people|leaf:leaves|knife:knives
wolf:wolves|shelf:shelves|loaf:loaves|half:halves|life:lives|wife:wives|city:cities|baby:babies|story:stories
party:parties|country:countries|berry:berries|puppy:puppies|lady:ladies|family:families|box:boxes|fox:foxes|bus:buses
glass:glasses|dish:dishes|watch:watches|church:churches|peach:peaches|brush:brushes|class:classes|bench:benches
tomato:tomatoes|potato:potatoes|hero:heroes|echo:echoes|cat:cats|dog:dogs|book:books|car:cars|tree:trees|table:tables
river:rivers|window:windows|key:keys|boy:boys
""")

KINDS = {
    "animal": _list("dog cat horse cow sheep lion tiger rabbit monkey elephant"),
    "fruit": _list("apple banana cherry grape lemon mango peach pear plum melon"),
    "vehicle": _list("car bus train truck bicycle tram van taxi scooter tractor"),
    "instrument": _list("piano violin guitar flute drum trumpet harp cello clarinet banjo"),
}

COLOURS = _table("""
a banana:yellow|a lemon:yellow|the sun:yellow|butter:yellow|an egg yolk:yellow|a canary:yellow|grass:green|a lime:green
a cucumber:green|spinach:green|broccoli:green|an emerald:green|a cactus:green|snow:white|milk:white|salt:white
a swan:white|flour:white|a polar bear:white|cream:white|coal:black|tar:black|a raven:black|a panther:black
the night sky:black|blood:red|a tomato:red|a strawberry:red|a ruby:red|a fire engine:red|a stop sign:red
a carrot:orange|a pumpkin:orange|a tangerine:orange|a basketball:orange|chocolate:brown|a coffee bean:brown
a walnut:brown|soil:brown|a chestnut:brown|the clear sky:blue|the sea:blue|a blueberry:blue|a sapphire:blue
an elephant:grey|concrete:grey|a rain cloud:grey|a dolphin:grey|a flamingo:pink|a pig:pink
""")
