"""Ordinary text, to see whether a model forgets it: a few sentences of each language, written for this purpose."""

from __future__ import annotations

ENGLISH = """\
The old lighthouse stood at the end of the pier, and every evening its keeper climbed the stairs to light the lamp.
Rain had fallen all night, so the paths through the forest were soft and smelled of earth and leaves.
Bread is made from flour, water, salt and yeast; the dough has to rest before it goes into the oven.
My grandmother kept her letters in a wooden box, tied together with a blue ribbon.
The train to the coast leaves at seven in the morning and arrives a little before noon.
Birds that live near the sea often build their nests on steep cliffs, where foxes cannot reach them.
A good teacher listens to the questions of the pupils before giving an answer.
The town council decided to plant two hundred trees along the main street next spring.
When the water in the lake freezes, the children bring out their skates and stay until it gets dark.
He opened the window because the room was warm and he wanted to hear the music from the square.
Scientists believe that the valley was once covered by a large glacier which melted slowly.
She wrote the first chapter of her novel in a small café near the university.
Cheese keeps longer if it is wrapped in paper and stored in a cool, dark place.
The museum is closed on Mondays, but visitors may walk in the garden behind it.
Before the bridge was built, people crossed the river in flat wooden boats.
The carpenter measured the board twice, drew a line with his pencil and began to saw.
In autumn the hills turn red and yellow, and the farmers bring in the last of the grapes.
Nobody knew who had painted the picture, although everybody in the village recognised the house on it.
The doctor told him to drink more water and to walk for half an hour every day.
Our neighbours have a brown dog that sleeps in front of their door for most of the afternoon.
The first telescopes were simple tubes with two lenses, yet they changed what people thought about the sky.
If you follow the road past the church, you will see the mill on your left.
They sat by the fire and told each other stories until the candles had burned down.
The shop sells paper, ink, maps and, since last year, also second-hand books.
""".splitlines()

FRENCH = """\
Le vieux phare se dressait au bout de la jetée, et chaque soir son gardien montait l'escalier pour allumer la lampe.
Il avait plu toute la nuit, si bien que les chemins de la forêt étaient mous et sentaient la terre et les feuilles.
Le pain se fait avec de la farine, de l'eau, du sel et de la levure ; la pâte doit reposer avant d'aller au four.
Ma grand-mère gardait ses lettres dans une boîte en bois, attachées par un ruban bleu.
Le train pour la côte part à sept heures du matin et arrive un peu avant midi.
Les oiseaux qui vivent près de la mer construisent souvent leur nid sur des falaises, hors de portée des renards.
Un bon professeur écoute les questions des élèves avant de donner une réponse.
Le conseil municipal a décidé de planter deux cents arbres le long de la grande rue au printemps prochain.
Quand l'eau du lac gèle, les enfants sortent leurs patins et restent jusqu'à la tombée de la nuit.
Il ouvrit la fenêtre parce que la pièce était chaude et qu'il voulait entendre la musique de la place.
Les savants pensent que la vallée était autrefois couverte d'un grand glacier qui a fondu lentement.
Elle a écrit le premier chapitre de son roman dans un petit café près de l'université.
Le fromage se garde plus longtemps s'il est enveloppé dans du papier et rangé dans un endroit frais et sombre.
Le musée est fermé le lundi, mais les visiteurs peuvent se promener dans le jardin qui se trouve derrière.
Avant la construction du pont, les gens traversaient la rivière dans des barques plates en bois.
Le menuisier mesura la planche deux fois, traça une ligne avec son crayon et se mit à scier.
En automne les collines deviennent rouges et jaunes, et les paysans rentrent les derniers raisins.
Personne ne savait qui avait peint le tableau, bien que tout le village reconnût la maison qu'on y voyait.
Le médecin lui a dit de boire plus d'eau et de marcher une demi-heure tous les jours.
Nos voisins ont un chien brun qui dort devant leur porte presque tout l'après-midi.
Les premières lunettes étaient de simples tubes à deux lentilles, et pourtant elles ont changé notre idée du ciel.
Si vous suivez la route après l'église, vous verrez le moulin sur votre gauche.
Ils s'assirent près du feu et se racontèrent des histoires jusqu'à ce que les bougies fussent consumées.
Le magasin vend du papier, de l'encre, des cartes et, depuis l'année dernière, aussi des livres d'occasion.
""".splitlines()
