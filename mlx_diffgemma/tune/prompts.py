"""Prompts of many kinds to tune on where the user gives none: short and long answers, prose, code,
lists, data, arithmetic, several languages."""

from __future__ import annotations

PROMPTS = (
    # Questions with short answers.
    "What is the capital of Portugal? Answer with its name alone.",
    "How many legs do three spiders have together? Give the number only.",
    "Which element has the symbol Fe? One word.",
    "Is 91 a prime number? Answer yes or no, then give the reason in one sentence.",
    "In which ocean do the Azores lie?",
    "Name the author of 'Pride and Prejudice'.",
    "What comes next: 2, 3, 5, 8, 12, 17, ...? Give the number.",
    "Which is heavier, a litre of oil or a litre of water? One sentence.",
    # Explanations.
    "Explain to a child of eight why the moon seems to follow a moving car.",
    "Why does bread rise? Write three sentences.",
    "What is the difference between weather and climate?",
    "Explain what a hash table is and when it is slow.",
    "How does a refrigerator move heat out of its inside?",
    "Why are there leap years, and why was 1900 none?",
    "What happens in the body when one holds one's breath for a minute?",
    "Explain compound interest with a small example.",
    # Arithmetic and reasoning, step by step.
    "A train leaves at 9:40 and takes 2 hours 35 minutes. When does it arrive?",
    "Compute 17 * 24 step by step.",
    "Anna is twice as old as Ben. In six years they will be 42 together. How old are they now?",
    "A shirt costs 40 euros after a discount of 20 percent. What did it cost before?",
    "Put these in order of size, smallest first: 0.7, 2/3, 0.66, 3/4.",
    "Three boxes hold 12, 18 and 24 apples. How many must move so that all hold the same?",
    "If all bloops are razzies and some razzies are lazzies, must some bloops be lazzies? Explain.",
    "How many minutes are there in a week? Show the multiplication.",
    # Code.
    "Write a Python function that returns the second largest number of a list.",
    "Write a shell command that counts the lines of all .txt files below the current folder.",
    "Write an SQL query for the three customers with the most orders.",
    "Turn this loop into a list comprehension: out = []\nfor x in xs:\n    if x > 0:\n"
    "        out.append(x * x)",
    "What does this print, and why? print([i for i in range(10) if i % 3 == 1])",
    "Write a JavaScript function that waits a number of milliseconds before it resolves.",
    "Find the mistake: def mean(xs): return sum(xs) / len(xs) if xs else 0 / len(xs)",
    "Write a regular expression for dates such as 2024-02-29, and say what it does not check.",
    # Data and forms.
    'Write JSON with the keys "name", "age" and "city" for: Mira, 34 years old, lives in Oslo.',
    "Make a Markdown table of the four largest planets and their diameters.",
    "Convert to CSV with a header: apples 3 kg 4.50, pears 2 kg 5.10, plums 1 kg 2.80",
    "Extract all email addresses: write to jo@example.org or, after May, to sales@example.com.",
    "Write a YAML file for a service 'web' on port 8080 with two replicas.",
    "Sort these words by length, then by alphabet: pear, fig, apple, kiwi, plum, banana",
    "Give the dates of all Mondays of January 2024 as a list in the form YYYY-MM-DD.",
    "Label as positive, negative or neutral: 'The room was fine, but breakfast was cold.'",
    # Summaries and rewriting.
    "Shorten to one sentence: The meeting was moved from Tuesday to Thursday because the room was "
    "taken, and it will now begin at ten and not at nine, so that those from out of town can come.",
    "Rewrite in a friendly tone: Your form is incomplete. Send it again.",
    "Make this formal: hey, can u send me the numbers till friday? thx",
    "Correct spelling and grammar: Their going too the libary on thursday, isnt it?",
    "Give a title of at most six words to a story about a lighthouse keeper who fears the dark.",
    "Rewrite in the passive voice: The committee will announce the winners tomorrow.",
    "List the three main points: Cities plant trees because they cool streets, hold back rain water"
    " and make people walk more.",
    "Rewrite for readers without technical knowledge: The server returned a 503 because the pool of"
    " connections was exhausted.",
    # Prose and verse.
    "Write a haiku about the first frost.",
    "Begin a mystery story with exactly two sentences.",
    "Describe a busy market in the morning, in about eighty words.",
    "Write a limerick about a cat that learns to type.",
    "Write a short dialogue in which two neighbours argue about a hedge and make peace.",
    "Write a letter of thanks to a teacher, in about a hundred words.",
    "Invent a proverb and explain what it means.",
    "Describe the taste of lemon to somebody who has never eaten one.",
    # Other languages.
    "Translate into French: Where can I buy a ticket for the night train?",
    "Übersetze ins Englische: Der Schlüssel liegt unter der dritten Stufe.",
    "¿Cuál es la diferencia entre 'ser' y 'estar'? Responde en español con dos ejemplos.",
    "Écris trois phrases sur la mer en hiver.",
    "Translate into Japanese, with the reading in Latin letters: Thank you for waiting.",
    # Plans and advice.
    "Plan a rainy Sunday in a small town, hour by hour, from nine to six.",
    "Give five tips for somebody who speaks before an audience for the first time.",
    "Write a shopping list for pancakes for four people, with amounts.",
)
