"""Messages of one person in a long conversation, for benchmarks. The model's answers follow each of them."""

MESSAGES = (
    "I have inherited a small house with a garden of about 300 square metres, half of it lawn, half of it nothing but "
    "bindweed and old roses. I have never grown anything. It is early March, I work full time, and I can spend perhaps "
    "four hours a week on it. Where should I begin, and what should I leave alone this year?",
    "The soil is heavy clay, and there are puddles for two days after rain at the lower end, near the shed. Is that a "
    "reason to give up on vegetables there, or can it be put right without hiring a digger?",
    "A neighbour says I should cover everything with cardboard and compost and never dig. Another says to dig it all "
    "over twice. They have both been at it for thirty years. How do I decide between them, on clay, with bindweed?",
    "Let us say I take the cardboard way for two beds of 1.2 by 4 metres each. How much compost do I need in litres if "
    "I want it 15 centimetres deep, and how many wheelbarrow loads of 80 litres would that be?",
    "What can go into those two beds in April and May that survives a beginner, and a week now and then in which "
    "nobody waters? I like salads, beans, and anything that children eat straight from the plant.",
    "The children are five and eight. I would like each of them to have one thing that is entirely theirs. What would "
    "you give the five-year-old, so that there is something to see within two weeks?",
    "And the roses? There are eleven of them, leggy, with black spots on last year's leaves. They belonged to my aunt, "
    "so I would like to keep at least some. It is still March. What do I do with them now, step by step?",
    "I have cut them as you said, and one of them turns out to be hollow and brown inside right down to the ground. Is "
    "it dead? How can I tell, and does whatever killed it threaten the others?",
    "Let me give you an idea of the money: I would like to spend no more than 350 euros this year, tools included. I "
    "own a spade, a bucket and gloves. Write me a list with rough prices, in the order in which I should buy.",
    "That is more than I thought for compost. Is there any way of getting it cheaper, or of making some by June from "
    "what is here: leaves from last autumn, a heap of rose cuttings, kitchen scraps, and grass?",
    "There is also a rain barrel, 500 litres, connected to the shed roof of 12 square metres. We get about 45 "
    "millimetres of rain in April. How much water would that be, and for how many weeks does it serve the two beds?",
    "Slugs. Everybody warns me about slugs. What really works, in your judgement, if I do not want to use pellets and "
    "do not want to go out with a torch every night?",
    "It is the middle of May now. The beans came up and something has eaten the first leaves into lace, but I have "
    "not seen a single slug. There are tiny holes, and little black beetles that jump when I touch the plant.",
    "You mentioned a net. The bed is 1.2 metres wide, the beans will climb to two metres. How would one build a frame "
    "for the net that two people can lift off, from battens of 24 by 48 millimetres that come 3 metres long?",
    "Let me change one thing that I said at the beginning: it will be two hours a week from now on, not four. What "
    "would you drop from everything that we have planned so far, and what must on no account be dropped?",
    "The eight-year-old wants to know why the peas twist around the string always in the same direction. Could you "
    "explain it so that she understands, and give her something to try out that shows it?",
    "We are away for sixteen days in August. A student next door would come by three times. Write her a note: what to "
    "do on each visit, what she may pick, and what to do if the barrel is empty.",
    "Before I forget: the hollow rose did shoot again from below, but the leaves look different, seven to a stem "
    "instead of five, and paler. What is that, and should I be glad?",
    "I would like to keep a record, so that next year I know better. Which five things should I write down each week, "
    "given everything we have talked about, in no more than five minutes?",
    "Last one for today. Look back over this whole conversation and tell me which of my decisions you would have "
    "advised against, and which single job I should do on the first free Saturday in September.",
)
"""Messages of 40 to 90 tokens each, sent from March to September of one year."""
