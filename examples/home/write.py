#!/usr/bin/env python3
"""Write train.jsonl and test.jsonl of the "home" example, next to this file.

Commands for a smart home in, one line of JSON out.  The wordings are
all below; this script only fills their slots, so each label follows from the
block a wording stands in.  Standard library only, same bytes every time.

    python3 write.py            write the two files
    python3 write.py --check    fail if the files on disk differ

How to read the wordings.  A line "# devices action" opens a block.  Slots:
  {r}   a room         {d}   a word for the device     {d1}  singular only
  {ds}  plural only    {pct} {deg} ...  a value (see VALUES)
A line that starts with "[all]" or "[kitchen]" has that room although no slot
names it; a line without either has no room (null).
"""

import json
import os
import random
import re
import sys

SEED = 5
PER_DEVICE = 77  # training rows for each device
TEST_EACH = 50  # rows in each half of the test set
SYS = "Turn the command into one line of JSON with the keys device, room, action, value."

ACTIONS = {  # what each device can do
    "lamp": "on off set up down",
    "heating": "on off set up down",
    "blinds": "open close set",
    "fan": "on off set up down",
    "tv": "on off set up down",
    "speaker": "on off set up down start stop",
    "lock": "lock unlock",
    "oven": "on off set up down start stop",
    "vacuum": "start stop",
    "alarm": "on off set",
    "coffee_maker": "on off start stop",
    "window": "open close set",
}
ACTIONS = {k: v.split() for k, v in ACTIONS.items()}

ROOM_WORDS = {
    "kitchen": ["kitchen"],
    "bedroom": ["bedroom"],
    "living_room": ["living room", "lounge"],
    "bathroom": ["bathroom"],
    "office": ["office", "study"],
    "hall": ["hall", "hallway"],
    "garage": ["garage"],
    "garden": ["garden"],
    "nursery": ["nursery", "baby's room"],
}
INDOORS = [r for r in ROOM_WORDS if r != "garden"]
ROOMS_OF = {  # rooms in which a device is talked about
    "lamp": list(ROOM_WORDS),
    "heating": INDOORS,
    "blinds": [r for r in INDOORS if r != "garage"],
    "fan": [r for r in INDOORS if r != "hall"],
    "tv": ["kitchen", "bedroom", "living_room", "office", "nursery", "garage"],
    "speaker": list(ROOM_WORDS),
    "lock": ["kitchen", "bedroom", "bathroom", "office", "hall", "garage", "garden", "nursery"],
    "oven": ["kitchen"],
    "vacuum": INDOORS,
    "alarm": ["office", "hall", "garage", "garden", "nursery", "kitchen", "living_room"],
    "coffee_maker": ["kitchen", "office", "living_room", "garage"],
    "window": INDOORS,
}
WORDS = {  # device: ({d1} singular, {ds} plural, {d} any)
    "lamp": (["light", "lamp"], ["lights", "lamps"], ["light", "lights", "lamp"]),
    "heating": (["heating", "radiator", "heater"], ["radiators", "heaters"], ["heating", "radiator", "heater"]),
    "blinds": (["blind", "curtain"], ["blinds", "curtains"], ["blinds", "curtains"]),
    "fan": (["fan", "ceiling fan"], ["fans"], ["fan", "fan", "ceiling fan"]),
    "tv": (["TV", "telly", "television"], ["TVs", "tellies"], ["TV", "telly", "television"]),
    "speaker": (["speaker"], ["speakers"], ["speaker", "speakers"]),
    "lock": (["door"], ["doors"], ["door"]),
    "oven": (["oven"], ["ovens"], ["oven"]),
    "vacuum": (
        ["vacuum", "hoover", "robot vacuum"],
        ["vacuums"],
        ["vacuum", "hoover", "robot vacuum", "vacuum cleaner"],
    ),
    "alarm": (["alarm", "burglar alarm"], ["alarms"], ["alarm", "burglar alarm"]),
    "coffee_maker": (["coffee machine", "coffee maker"], ["coffee machines"], ["coffee machine", "coffee maker"]),
    "window": (["window"], ["windows"], ["window", "windows"]),
}
VALUES = {
    "pct": list(range(5, 100, 5)),  # per cent
    "low": list(range(5, 55, 5)),  # ... for dimming
    "high": list(range(50, 100, 5)),  # ... for brightening
    "deg": list(range(15, 26)),  # room temperature
    "cool": [15, 16, 17, 18, 19],
    "warm": [20, 21, 22, 23, 24, 25],
    "odeg": list(range(140, 245, 10)),  # oven temperature
    "amt": [2, 3, 4, 5],  # by how much
    "amt10": [10, 15, 20, 25, 30],  # the same, for the oven
    "spd": [1, 2, 3, 4, 5],  # fan speed
    "vol": list(range(5, 75, 5)) + [8, 12, 18, 22, 33],
    "ch": list(range(1, 61)),  # TV channel
    "min": [5, 10, 12, 15, 20, 25, 30, 35, 40, 45, 50],
    "cups": [2, 3, 4, 5, 6, 8],
    "col": ["red", "blue", "green", "purple", "orange", "pink", "yellow", "white"],
    "prog": ["news", "weather", "football", "cartoons", "snooker"],
    "genre": ["jazz", "rock", "pop", "blues", "reggae", "techno"],
    "vmode": ["quiet", "turbo", "eco"],
    "amode": ["home", "away", "night", "holiday"],
    "drink": ["espresso", "latte", "cappuccino", "mocha", "americano"],
}
DIGITS_ONLY = {"odeg", "ch"}
WORDY = 0.16  # share of other numbers that are written as words

TRAIN = """
# lamp,fan,tv,heating,speaker on
Turn on the {r} {d}.
Turn the {d} on in the {r}, please.
Switch on the {r} {d}, thanks.
Can you switch the {d} on in the {r}?
{r} {d} on
{d} on in the {r}
Put the {r} {d} on.
Could you put on the {d} in the {r} please?
I'd like the {r} {d} on.
I'm in the {r}, turn the {d} on.
Power up the {r} {d}.
Would you mind switching on the {r} {d}?
Let's have the {d} on in the {r}.
Why is the {r} {d1} still off? Turn it on.
Morning! {r} {d} on please.
Somebody left the {r} {d1} off, switch it back on.
# lamp,fan,tv,heating,speaker,oven,alarm,coffee_maker on
Turn on the {d}.
{d} on please
Please switch the {d} on for me.
# lamp,fan,heating,speaker on
[all] Turn on all the {ds}.
[all] Switch on every {d1} in the house.
[all] I want all {ds} on, please.
# lamp,fan,tv,heating,speaker,coffee_maker off
Turn off the {r} {d}.
Turn the {d} off in the {r}, please.
Switch off the {d} in the {r}.
Could you switch the {r} {d} off?
{r} {d} off
{d} off in the {r} thanks
Nobody's in the {r}, so turn the {d} off.
I've left the {r}, you can switch the {d} off.
Please make sure the {r} {d1} is off.
I think I left the {r} {d1} on, turn it off.
We don't need the {d} on in the {r} any more.
Shut off the {r} {d}.
The {d1} in the {r} is still on, turn it off.
Have you seen the bill? Switch off the {r} {d}.
# lamp,fan,tv,heating,speaker,oven,alarm,coffee_maker off
Turn off the {d}, please.
Just switch the {d} off.
{d} off
# lamp,fan,tv,heating,speaker off
[all] Turn off all the {ds}.
[all] Switch off every {d1} in the house.
[all] All {ds} off please
[all] We're off to bed, turn the {ds} off everywhere.
# lamp,fan,tv,heating,speaker up
Turn up the {r} {d}.
Turn the {d} up in the {r}.
{r} {d} up a bit
Can you turn the {d} up a little in the {r}?
Crank up the {d} in the {r}.
{d} up please
I think the {r} {d1} needs turning up.
# lamp,fan,tv,heating,speaker down
Turn down the {r} {d}.
Turn the {d} down in the {r}, thanks.
{r} {d} down a notch
Please turn the {d} down a little in the {r}.
{d} down please
Any chance of turning down the {r} {d}?

# lamp on
It's too dark in the {r}, switch the light on.
I can't see a thing in the {r}, lights on please.
It's getting dark, put the {r} lamp on.
Light up the {r}.
Give me some light in the {r}.
I need light in the {r}.
[all] Lights on in every room please
[all] I heard a noise, light up the whole house!
# lamp off
Kill the lights in the {r}.
Lights out in the {r}.
Everyone is asleep, {r} lights off.
The {r} light is still burning, put it out.
[all] Kill every light in the house.
[all] Lights out everywhere, good night.
# lamp,blinds,window set
Set the {r} {d} to {pct}%.
[all] Set all the {ds} to {pct} percent.
Put the {d} at {pct} percent in the {r}.
# lamp set
Dim the {r} {d} to {low} percent.
Brightness in the {r} to {pct}
{r} lights {pct} percent
I want the {r} lamp at {pct} percent.
Can you dim the lights to {low} in the {r}?
Make the {r} lights {pct}% bright, please.
Bring the {d} in the {r} down to {low} percent.
Turn the {r} light up to {high}.
Film time: lights in the {r} at {low}%.
[all] Dim every light in the house to {low}%.
Set the lamp to {pct}.
Lights at {pct} percent please
Put the brightness of the {r} lamp at {pct}.
Make the {r} {d} {col}.
Turn the {d} {col} in the {r}.
I feel like {col} light in the {r}.
Change the {r} lamp to {col}.
{col} lights in the {r} please
[all] Make all the lights {col}.
Can the {r} light be {col}?
Set the lamp colour to {col}.
Could we have the {r} lights in {col} tonight?
# lamp up
Brighten the {r} {d}.
Make the {r} lights brighter.
The {r} lamp is too dim.
A bit brighter in the {r}, please.
Could the lights be brighter in the {r}?
I'm reading in the {r}, make the light a little brighter.
brighter lamp please
# lamp down
Dim the {r} {d}.
The light in the {r} is too bright.
Make it less bright in the {r}.
Soften the lights in the {r}.
The {r} lights hurt my eyes, dim them.
Dim the lamp a little.
Could you dim the lights in the {r} please?
[all] Dim the lights in the whole house.

# heating set
Set the {r} {d} to {deg} degrees.
Make it {deg} degrees in the {r}.
Heat the {r} to {warm}.
{r} thermostat to {deg}
I'd like it {deg} degrees in the {r}, please.
Put the heating at {deg} in the {r}.
Could you get the {r} to {deg} degrees?
Keep the {r} at {deg} degrees tonight.
Thermostat to {deg} please
Warm the {r} up to {warm}.
[all] Heat the whole house to {deg} degrees.
[all] {deg} degrees everywhere please
Guests are coming, set the {r} to {deg}°.
Let the {r} cool to {cool} degrees.
Turn the thermostat down to {cool} in the {r}.
Turn the heating up to {warm} degrees in the {r}.
# heating up
It's too cold in the {r}.
It's freezing in the {r}.
I'm shivering in the {r}.
Make the {r} warmer.
Warm up the {r} a bit.
My feet are cold in the {r}, more heat please.
Turn the heating up by {amt} degrees in the {r}.
{amt} degrees warmer in the {r} please
Raise the {r} thermostat by {amt} degrees.
[all] It's cold in the whole house.
It's cold in here.
The {r} feels chilly, could you turn the heat up?
# heating down
The {r} is too warm, turn the heating down.
Lower the {r} thermostat by {amt} degrees.
{amt} degrees cooler in the {r}
Turn the {r} {d} down by {amt} degrees.
I'm sweating in the {r}, less heat please.
Less heating in the {r}.
[all] Turn the heating down in every room.
It's like a sauna in the {r}, turn the radiator down.
The {r} radiator is too hot.

# blinds,window open
Open the {r} {d}.
Open the {d} in the {r}, please.
Can you open up the {d} in the {r}?
{r} {d} open
I want the {r} {d} open.
[all] Open all the {ds}.
[all] Open every {d1} in the house.
Open the {d} please.
Would you open the {r} {d} for me?
Time to open the {d} in the {r}.
# blinds,window close
Close the {r} {d}.
Shut the {d} in the {r}.
Close the {d} in the {r} please, thanks.
{r} {d} closed please
Could you shut the {r} {d}?
[all] Close all the {ds}.
[all] Shut the {ds} everywhere.
Shut the {d}.
Pull the {d} shut in the {r}.
I forgot to close the {d} in the {r}, do it for me.
# blinds open
Good morning, open the {r} curtains.
Let the sun into the {r}, open the blinds.
I'd like to see outside, open the blinds in the {r}.
It's a lovely day, curtains open in the {r}.
[all] Wake everyone up, open the curtains in every room.
The plants in the {r} need sun, open the {d}.
# blinds close
The sun is in my eyes in the {r}, close the blinds.
The neighbours can see into the {r}, shut the curtains.
Time for a nap, close the {d} in the {r}.
It's getting dark outside, close the {r} curtains.
[all] Curtains closed in the whole house tonight.
There's glare on my screen in the {r}, shut the blinds.
# blinds set
Lower the {r} blinds to {low} percent.
Raise the blinds in the {r} to {high}%.
blinds at {pct} in the {r}
Move the {r} blinds to {pct} percent please.
[all] All blinds to {pct}%.
Blinds to {pct} percent.
I'd like the {d} {pct} percent open in the {r}.
# window open
It's stuffy in the {r}, open the window.
Let some fresh air into the {r}, window open please.
It smells of paint in the {r}, open a window.
The {r} needs airing, open the windows.
Something burnt, open the {r} window quickly.
[all] Fresh air for the whole house, open the windows.
# window close
It's raining, close the {r} window.
There's a draught in the {r}, shut the window.
It's noisy outside, shut the windows in the {r}.
[all] A storm is coming, close every window in the house.
Flies are getting into the {r}, shut the window.
[all] We're going out, all windows shut please.
# window set
Open the {r} window to {pct} percent.
Open the windows {pct} percent in the {r}.
{r} window at {pct} percent please

# fan set
Set the {r} fan to speed {spd}.
Fan speed {spd} in the {r}
Put the fan on {spd} in the {r}.
I want the {r} fan at level {spd}.
Run the {r} {d} at speed {spd}, please.
Fan to {spd}
Turn the {r} {d} to setting {spd}.
Could the fan in the {r} go to {spd}?
[all] All fans to speed {spd} please
Turn the fan in the {r} down to {spd}.
# fan on
I need a breeze in the {r}, fan on.
Get the air moving in the {r}, switch the fan on.
It's steamy in the {r}, turn the fan on.
# fan up
Make the {r} {d} faster.
Speed up the {d} in the {r}.
The fan in the {r} is too slow.
fan faster please
More wind from the {r} fan.
# fan down
Slow the {r} {d} down.
The {r} {d1} is too fast.
The fan is blowing my papers around in the {r}, slow it a little.
gentler fan in the {r} please
Make the fan slower.
# fan off
The fan in the {r} is too noisy, turn it off.

# tv set
Put channel {ch} on the {r} TV.
channel {ch} please
Switch the {r} telly to channel {ch}.
Change the TV in the {r} to {ch}.
Go to channel {ch} in the {r}.
Can we watch channel {ch} in the {r}?
Flip the telly over to {ch}.
{d} to channel {ch} in the {r}
What's on {ch}? Put it on the {r} TV.
Put the {prog} on the {r} {d}.
I want to watch the {prog} in the {r}.
Show me the {prog} on the telly.
Turn the {r} telly to the {prog}.
Are they showing the {prog}? Put it on the TV in the {r}.
Let's watch the {prog} in the {r}.
[all] Put the {prog} on every TV in the house.
# tv up
I can't hear the TV in the {r}.
The {r} telly is too quiet.
{d} louder in the {r} please
Make the TV louder.
Volume up on the {r} {d}.
# tv down
The {r} TV is too loud.
Make the telly quieter in the {r}.
Volume down on the {r} telly
I'm on the phone, turn the {r} TV down.
Not so loud with the TV in the {r}.
# tv off
I've finished watching, {r} TV off.
That's enough telly in the {r}, turn it off.
Nobody is watching the {r} TV, switch it off.
# tv on
My show starts soon, TV on in the {r}.
Let's watch something in the {r}, switch on the telly.

# speaker start
Play {genre} in the {r}.
Play some {genre}.
Put on some {genre} in the {r}, please.
I'm in the mood for {genre} in the {r}.
Start {genre} music in the {r}.
Can you play {genre} on the {r} speaker?
{genre} in the {r} please
[all] Play {genre} everywhere.
[all] {genre} in every room, let's party!
Let's hear some {genre} in the {r}.
I'm doing my chores, play {genre} in the {r}.
Play music in the {r}.
Start the music in the {r}.
Some music in the {r}, please.
[all] Play music in the whole house.
# speaker stop
Stop the music in the {r}.
Stop playing music in the {r}.
No more music in the {r}.
[all] Stop the music everywhere.
Stop the music, I need to think.
I'm on a call in the {r}, stop the music.
Pause the music in the {r}.
End the music in the {r} now.
Enough music in the {r}, stop it please.
# speaker set
Set the {r} speaker to volume {vol}.
Music volume {vol} in the {r}
Volume {vol} on the {r} speaker.
Put the speaker volume at {vol} in the {r}.
Turn the music up to {vol} in the {r}.
Bring the {r} music down to {vol}.
speaker at {vol} please
I'd like the music at {vol} percent in the {r}.
[all] Speaker volume {vol} everywhere.
# speaker up
The music is too quiet in the {r}.
Louder music in the {r} please
Turn up the music in the {r}.
Raise the {r} speaker volume by {amt}.
I love this song, make it louder in the {r}.
# speaker down
The music in the {r} is too loud.
Quieter music in the {r}.
Turn the music down, I'm trying to work in the {r}.
Lower the {r} speaker volume by {amt}.
softer music please
The kids are asleep, music down in the {r}.

# lock lock
Lock the {r} door.
Lock the door to the {r}, please.
Is the {r} door locked? Lock it.
Make sure the {r} door is locked.
[all] Lock all the doors.
[all] Lock up the whole house.
Lock the door.
Could you lock the {r} door for me?
{r} door locked please
Bolt the {r} door.
I'm leaving, lock the door of the {r}.
[all] Good night, lock every door.
Secure the {r} door.
I forgot to lock the {r} door.
Don't let anyone into the {r}, lock the door.
Keep the {r} door locked.
Lock up the {r}.
[all] Please lock the doors everywhere.
We're in bed already, lock the {r} door.
lock {r} door
The kids keep running into the {r}, lock the door.
# lock unlock
Unlock the {r} door.
Please unlock the door to the {r}.
[all] Unlock all the doors.
My hands are full, unlock the {r} door.
I'm locked out of the {r}.
{r} door unlocked please
Unlock the door, I'm home.
The plumber is at the {r} door, unlock it.
Can you unlock the {r} for me?
Let Anna in through the {r} door, unlock it.
Take the lock off the {r} door.
I need to get into the {r}, unlock it please.
[all] Unlock the doors everywhere.
Why is the {r} door locked? Unlock it.
Leave the {r} door unlocked.
The parcel goes in the {r}, unlock the door.
unlock {r}
[all] There's a fire, unlock every door!

# oven on
Turn the oven on, I'm making a pie.
[kitchen] Switch on the oven in the kitchen.
I'm about to bake, switch on the oven.
Get the oven on for the chips.
[kitchen] Could you turn on the kitchen oven?
# oven off
The roast is done, oven off.
[kitchen] Switch off the kitchen oven.
I can smell burning, turn the oven off.
Did I leave the oven on? Turn it off.
[kitchen] Turn the oven in the kitchen off, please.
# oven set
Preheat the oven to {odeg}.
Set the oven to {odeg} degrees.
oven at {odeg} please
Heat the oven to {odeg} degrees for the pizza.
[kitchen] Get the kitchen oven to {odeg}°.
I need the oven at {odeg} for a cake.
Bread goes in soon, oven to {odeg}.
Put the oven on {odeg}.
Turn the oven down to {odeg}.
The recipe says {odeg} degrees, set the oven.
Could you warm the oven to {odeg}?
[kitchen] Set the oven in the kitchen to {odeg}, please.
# oven start
Start the oven for {min} minutes.
Bake for {min} minutes.
Run the oven for {min} minutes.
Give the lasagne {min} minutes in the oven.
[kitchen] Start the kitchen oven for {min} minutes please.
oven {min} minutes, go
The muffins are in, start the oven for {min} minutes.
# oven stop
Stop the oven.
Stop baking.
Please stop the oven now.
[kitchen] Stop the kitchen oven.
The timer rang, stop the oven.
[kitchen] Stop the oven in the kitchen, please.
# oven up
The oven isn't hot enough, turn it up.
Turn the oven up by {amt10} degrees.
Oven up a bit.
{amt10} degrees hotter in the oven please
# oven down
The oven is too hot.
The crust is getting too dark, turn the oven down.
Turn the oven down by {amt10} degrees.
Lower the oven by {amt10} degrees.

# vacuum start
Vacuum the {r}.
Hoover the {r} please.
Send the {d} to the {r}.
Clean the {r} floor.
The {r} floor is filthy.
There are crumbs all over the {r} floor.
Let the {d} do the {r}.
[all] Vacuum the whole house.
[all] Hoover everywhere please
Vacuum the {r} for {min} minutes.
Run the {d} for {min} minutes in the {r}.
Give the {r} a hoover for {min} minutes.
Vacuum the {r} in {vmode} mode.
Start the {d} on {vmode} in the {r}.
Use {vmode} mode to hoover the {r}.
[all] Hoover the whole house in {vmode} mode.
The dog has been in the {r}, send the hoover.
Could the {d} go over the {r} floor?
We have visitors soon, hoover the {r}.
Get the hoover going in the {r}.
I dropped flour on the {r} floor, vacuum it up.
{r} needs hoovering
# vacuum,coffee_maker start
Start the {d}.
Start the {d} in the {r}.
Could you start the {r} {d} please?
# vacuum,coffee_maker stop
Stop the {d}.
Stop the {d} in the {r}.
{d} stop
The {d1} in the {r} is too noisy, stop it.
Tell the {d} to stop in the {r}.
Stop the {r} {d}, thanks.
# vacuum stop
Stop vacuuming the {r}.
Stop hoovering, I'm on the phone.
[all] Stop vacuuming everywhere.
That's clean enough in the {r}, stop the {d}.
No more hoovering in the {r} today.
The {r} is clean, stop the hoover.
Someone is sleeping in the {r}, stop the {d}.

# alarm on
Arm the alarm.
Arm the {r} {d}.
Activate the {d} in the {r}.
We're leaving, alarm on please.
I'm off to work, switch the alarm on.
Make sure the {r} alarm is on.
[all] Arm the alarms in the whole house.
Protect the {r} with the alarm tonight.
[all] Arm every alarm.
Turn on the alarm in the {r} before we go.
alarm on in {r} thanks
# alarm off
Disarm the alarm.
Disarm the {d} in the {r}.
Deactivate the {r} {d}.
We're back, alarm off.
It's only the cat, turn off the {r} alarm.
False alarm in the {r}, switch it off.
Alarm off, it's just me.
[all] Disarm all the alarms.
The {d} in the {r} is ringing for nothing, turn it off.
Please disarm the {r} {d}, we're home.
[all] Turn off the alarms everywhere, please.
# alarm set
Set the alarm to {amode} mode.
Put the {r} {d} in {amode} mode.
alarm to {amode}
Switch the {d} over to {amode} mode.
Change the {d} in the {r} to {amode} mode.
{amode} mode for the alarm please
Use the {amode} setting on the {r} alarm.
We want the {d} in {amode} mode.
[all] {amode} mode on all alarms.

# coffee_maker on
Coffee machine on in the {r}, please.
Switch the coffee maker on, I'm getting up.
Turn on the {d} in the {r}.
# coffee_maker off
Coffee machine off, I've had enough.
# coffee_maker start
Make some coffee.
Brew a pot of coffee in the {r}.
Start the coffee.
I need coffee.
Coffee please
Good morning, start the coffee machine.
I could really use a coffee.
Get the coffee brewing in the {r}.
Make me {drink}.
I'd love {drink}.
{drink} please
Brew {drink} in the {r}.
Could I have {drink}?
Have the {r} {d} make {drink}.
Get {drink} started in the {r}.
{drink} from the {r} coffee machine, thanks
I'm still half asleep, make {drink}.
Fix me {drink}, would you?
Make {cups} cups of coffee.
Brew {cups} cups in the {r}.
We have guests, {cups} cups of coffee please.
coffee for {cups} please
Start the {d} for {cups} cups.
# coffee_maker stop
Stop the coffee.
Stop brewing.
No more coffee, stop the machine.
That's enough coffee in the {r}, stop brewing.
The cup is overflowing, stop the coffee maker!
"""

# Wordings of the "new" half of the test set; none of them is in TRAIN.
NEW = """
# lamp on
The {r} is pitch black, get the {d1} on.
Would it be possible to have the {d} switched on over in the {r}?
# lamp off
You can turn out the {r} lights now.
[all] Before I go to sleep, switch off each and every light.
# lamp set
How about {high}% brightness for the {r} lights?
The {r} lamp would be nicer at {pct} percent.
Go {col} with the {r} lights.
I'd love to see the {r} lamp turn {col}.
# lamp up
I can barely read in the {r}, the lamp should be brighter.
# lamp down
That {r} lamp is blinding me, dim it a touch.
# heating on
First frost tonight, so have the {r} radiator switched on.
# heating off
Summer's here, the {r} radiator can be switched off.
[all] Nobody will be in this week, heating off in all the rooms.
# heating set
When I get back it should be {deg} degrees in the {r}.
Aim for {deg} degrees with the {r} radiator.
# heating up
Brr, the {r} is like an icebox.
Why is it so cold in the {r}?
Add {amt} degrees to the {r} heating.
# heating down
Take {amt} degrees off the {r} heating.
We're roasting in the {r}, the heating should go down.
# blinds open
Rise and shine, get the {r} curtains open.
The view from the {r} is splendid today, open those blinds.
# blinds close
I'd prefer the {r} curtains closed for a bit of privacy.
I'm getting changed, so the {r} blinds should be shut.
# blinds set
Bring the {r} blinds to the {pct} percent mark.
Could the {r} curtains go to {pct}%?
# window open
The {r} could do with some air, get the window open.
Onions everywhere! Quick, have the {r} window opened.
# window close
Rain is coming in, get the {r} window shut.
A wasp just flew into the {r}, please keep that window closed.
# window set
Leave the {r} window {pct} percent open.
I think {pct}% would do for the {r} window.
# fan on
What a scorcher! Have the {r} fan switched on.
# fan off
I'm done with the fan in the {r}, off with it.
# fan set
Speed {spd} is what I want from the {r} fan.
Let the {r} fan spin at {spd}.
# fan up
That {r} fan is hardly moving, it should go faster.
# fan down
The {r} fan is like a hurricane, make it gentler.
# tv on
Match night! Get the {r} telly switched on.
# tv off
Homework first: the {r} TV goes off.
# tv set
Find channel {ch} on the {r} telly.
I'd rather see the {prog} on the {r} TV.
The kids are asking for channel {ch}, the {r} TV please.
# tv up
My hearing isn't what it was, make the {r} TV a bit louder.
# tv down
The neighbours are complaining about the {r} TV, lower the sound.
# speaker start
How about some {genre} in the {r}?
Fill the {r} with {genre}.
[all] I want to hear {genre} from every speaker in the house.
# speaker stop
Could the music in the {r} stop now?
# speaker set
Have the {r} speaker at volume {vol}.
{vol} is the right volume for the {r} speaker.
# speaker up
We can hardly hear the music in the {r}.
# speaker down
I can't hear myself think with that loud music in the {r}, turn it down.
# lock lock
Double-check the {r} door and lock it.
The {r} door should stay locked tonight.
Don't leave the {r} door unlocked, lock it.
[all] Nobody gets in tonight, so every door locked please.
# lock unlock
I've forgotten my key, unlock the door at the {r}.
The cleaner needs to come in by the {r} door, have it unlocked.
Would you undo the lock on the {r} door?
# oven on
I'm ready to cook, so the oven should be on.
# oven off
Dinner's out, you can switch the oven off.
# oven set
Pizza tonight! Bring the oven up to {odeg}.
The cake wants {odeg} degrees, so adjust the oven.
# oven start
The potatoes need {min} minutes, start the oven.
# oven down
The biscuits are burning at the edges, the oven should go down a bit.
# vacuum start
The {r} could do with a hoover.
I spilled rice in the {r}, have the vacuum deal with it.
Spend {min} minutes vacuuming the {r}.
Do the {r} floor with the vacuum, {vmode} mode.
# vacuum stop
The vacuum has done enough in the {r}, have it stop.
[all] All this hoovering around the house has to stop.
# alarm on
Nobody's staying in, so get the alarm armed.
Have the {r} alarm armed tonight.
# alarm off
The builders are here, so have the {r} alarm disarmed.
I set off the {r} alarm by mistake, disarm it.
# alarm set
For the rest of the day the alarm should be in {amode} mode.
Go to {amode} mode on the {r} alarm.
# coffee_maker on
Have the coffee machine switched on before I get up.
# coffee_maker off
I won't be drinking any more, get the {r} coffee machine switched off.
# coffee_maker start
I'm dying for {drink}.
Let's have {cups} cups of coffee from the {r} machine.
Surprise my wife with {drink}, please.
# coffee_maker stop
Hold on, stop making coffee.
"""

TYPOS = {
    "turn": "trun",
    "please": "plase",
    "switch": "swich",
    "the": "teh",
    "kitchen": "kichen",
    "bedroom": "bedrom",
    "lights": "ligths",
    "volume": "volme",
    "heating": "heatng",
    "window": "windwo",
    "speaker": "speeker",
    "coffee": "cofee",
    "degrees": "degress",
    "percent": "pecent",
    "curtains": "curtians",
    "unlock": "unlok",
    "channel": "chanel",
    "minutes": "mintues",
    "vacuum": "vaccum",
    "music": "musci",
    "garage": "garrage",
    "hallway": "halway",
}
TYPO_RATE = 0.028

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SLOT = re.compile(r"\{(\w+)\}")


def words_of(n):
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + ("" if n % 10 == 0 else "-" + ONES[n % 10])


def need(ok, why):
    if not ok:
        raise ValueError(why)


def parse(text):
    """The wordings as (text, fixed room or None, devices, action)."""
    out, devices, action = [], [], ""
    for line in text.splitlines():
        line = line.strip()
        if not line:
            continue
        if line.startswith("# "):
            names, action = line[2:].split()
            devices = names.split(",")
            for dev in devices:
                need(action in ACTIONS[dev], "no %s for %s" % (action, dev))
            continue
        room = None
        m = re.match(r"\[(\w+)\] ", line)
        if m:
            room, line = m.group(1), line[m.end() :]
            need("{r}" not in line, "two rooms: " + line)
        values = [s for s in SLOT.findall(line) if s in VALUES]
        need(len(values) <= 1, "two values: " + line)
        need((action == "set") == bool(values) or action in ("up", "down", "start"), "value and action: " + line)
        out.append((line, room, devices, action))
    return out


def fill(wording, device, rng, use):
    """One row of a wording: (text, label).

    use counts the rooms and values taken so far; rare ones come first.
    """
    text, room, _, action = wording
    value = None
    for slot in SLOT.findall(text):
        mark = "{%s}" % slot
        if slot == "r":
            names = ROOMS_OF[device]
            least = min(use.get(r, 0) for r in names)
            near = [r for r in names if use.get(r, 0) <= least + 6]
            room = rng.choice(near)
            word = rng.choice(ROOM_WORDS[room])
        elif slot in ("d1", "ds", "d"):
            word = rng.choice(WORDS[device][("d1", "ds", "d").index(slot)])
        else:
            used = [use.get((slot, v), 0) for v in VALUES[slot]]
            value = rng.choice([v for v, n in zip(VALUES[slot], used) if n <= min(used) + isinstance(v, int)])
            word = str(value)
            tail = text[text.index(mark) + len(mark) :][:1]
            if isinstance(value, int) and slot not in DIGITS_ONLY and tail not in ("%", "°") and rng.random() < WORDY:
                word = words_of(value)
            if slot == "drink":
                word = ("an " if word[0] in "aeiou" else "a ") + word
        text = text.replace(mark, word, 1)
    if wording[0][-1] in ".?!":
        text = re.sub(r"(?:^|[.?!] )[a-z]", lambda m: m.group(0).upper(), text)
    return text, {"device": device, "room": room, "action": action, "value": value}


def norm(text):
    """Lower case, without punctuation: what counts as the same text."""
    text = text.lower().replace("%", " percent").replace("°", " degrees")
    return " ".join(re.findall(r"[a-z0-9']+", text))


def phrases(lists, mark):
    return {norm(w): mark for ws in lists for w in ws}


FILLERS = {}
FILLERS.update(phrases([[words_of(n) for n in range(2, 100)]], "N"))
FILLERS.update(phrases([[w for w in VALUES[k] if isinstance(w, str)] for k in VALUES], "V"))
FILLERS.update(phrases(ROOM_WORDS.values(), "R"))
FILLERS.update(phrases([ws for three in WORDS.values() for ws in three], "D"))
FILLERS.update({"thermostat": "D", "music": "D"})
FILLER = re.compile(r"\b(?:%s|\d+)\b" % "|".join(sorted(map(re.escape, FILLERS), key=len, reverse=True)))
POLITE = re.compile(r"\b(?:please|thanks|(?:can|could|would) you|for me)\b")


def frame(text):
    """The sentence frame: slot fillers as marks, polite words dropped."""
    text = FILLER.sub(lambda m: FILLERS.get(m.group(0), "N"), norm(text))
    text = re.sub(r"\ban\b", "a", POLITE.sub(" ", text))
    return " ".join(text.split())


def dress(text, rng):
    """Some people type in lower case and leave the full stop out."""
    if rng.random() < 0.3:
        text = text.lower().rstrip(".?!")
    return text


def misspell(text, rng):
    places = [m for m in re.finditer(r"[a-z]+", text) if m.group(0) in TYPOS]
    if not places:
        return None
    m = rng.choice(places)
    return text[: m.start()] + TYPOS[m.group(0)] + text[m.end() :]


def row(text, label, group=None):
    answer = json.dumps(label, separators=(",", ":"))
    out = {
        "messages": [
            {"role": "system", "content": SYS},
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]
    }
    if group:
        out["group"] = group
    return out


def build():
    rng = random.Random(SEED)
    wordings, new_wordings = parse(TRAIN), parse(NEW)
    seen, train, known, new = set(), [], [], []
    typos = 0

    def take(wording, device, use, apart=()):
        """A row whose text is new, or None when the slots are used up.

        apart: pairs of wording and label that it must not repeat.
        """
        for _ in range(30):
            text, label = fill(wording, device, rng, use)
            if norm(text) not in seen and (wording[0], label) not in apart:
                seen.add(norm(text))
                for slot in SLOT.findall(wording[0]):
                    key = label["room"]
                    if slot in VALUES:
                        key = (slot, label["value"])
                    if slot == "r" or slot in VALUES:
                        use[key] = use.get(key, 0) + 1
                return text, label
        return None

    # Training rows: go round the wordings of each device until it has enough,
    # first those that are its own (those with a word as value twice), then
    # those it shares with other devices.
    used, pairs = set(), []
    for device in ACTIONS:
        own = [w for w in wordings if w[2] == [device]]
        shared = [w for w in wordings if device in w[2] and w not in own]
        need(len(own) <= PER_DEVICE, "more wordings than rows: " + device)
        use, count = {}, 0
        while count < PER_DEVICE:
            rng.shuffle(own)
            rng.shuffle(shared)
            shared.sort(key=lambda w: any((w[0], d) in used for d in w[2]))
            named = [
                w
                for w in own
                if any(  # a colour, a mode, ...
                    isinstance(v, str) for slot in SLOT.findall(w[0]) for v in VALUES.get(slot, [])
                )
            ]
            for w in own + named + shared:
                got = take(w, device, use) if count < PER_DEVICE else None
                if got:
                    count += 1
                    used.add((w[0], device))
                    pairs.append((w[0], got[1]))
                    text = dress(got[0], rng)
                    if rng.random() < TYPO_RATE:
                        bad = misspell(text, rng)
                        if bad:
                            text, typos = bad, typos + 1
                            seen.add(norm(text))
                    train.append((text, got[1], got[0]))
    for w in wordings:
        need(any((w[0], d) in used for d in w[2]), "never used: " + w[0])

    # Known half: wordings from above with another device, room or value, not
    # merely another word for the same.  New half: new wordings.
    order = sorted(ACTIONS)
    rng.shuffle(order)
    use_known, use_new = {}, {}
    pools = {d: [w for w in wordings if d in w[2]] for d in order}
    fresh = {d: [w for w in new_wordings if d in w[2]] for d in order}
    for d in order:
        rng.shuffle(pools[d])
        rng.shuffle(fresh[d])
    while len(known) < TEST_EACH:
        for d in order:
            got = None
            while pools[d] and not got:
                got = take(pools[d].pop(), d, use_known, pairs)
            if got and len(known) < TEST_EACH:
                known.append((dress(got[0], rng), got[1], got[0]))
    while len(new) < TEST_EACH:
        for d in order:
            got = take(fresh[d].pop(), d, use_new) if fresh[d] else None
            if got and len(new) < TEST_EACH:
                new.append((dress(got[0], rng), got[1], got[0]))

    check(train, known, new, wordings, new_wordings, typos)
    rng.shuffle(train)
    test = [row(t, a, "known") for t, a, _ in known]
    test += [row(t, a, "new") for t, a, _ in new]
    rng.shuffle(test)
    return [row(t, a) for t, a, _ in train], test


def check(train, known, new, wordings, new_wordings, typos):
    need(len(train) >= 800, "too few training rows: %d" % len(train))
    need(len(known) == TEST_EACH and len(new) == TEST_EACH, "test size")
    need(typos < 0.04 * len(train), "too many typos: %d" % typos)

    texts = [norm(t) for t, _, _ in train]
    need(len(set(texts)) == len(texts), "a text twice in train")
    clean = set(texts) | {norm(c) for _, _, c in train}
    tests = [norm(t) for t, _, _ in known + new]
    need(len(set(tests)) == len(tests), "a text twice in test")
    need(not clean & set(tests), "in train and test: %s" % (clean & set(tests)))

    # Frames: of every row that was written, with all fillers marked.
    old = {frame(c) for _, _, c in train}
    for _, _, c in known:
        need(frame(c) in old, "known row, unknown frame: " + c)
    for _, _, c in new:
        need(frame(c) not in old, "new row, known frame: " + c)
    need(len({frame(c) for _, _, c in new}) == len(new), "a new frame twice")
    # ... and of every wording, used or not.
    every = {}
    rng = random.Random(SEED)
    for which, ws in (("train", wordings), ("new", new_wordings)):
        for w in ws:
            for device in w[2]:
                for _ in range(20):
                    f = frame(fill(w, device, rng, {})[0])
                    need(every.setdefault(f, which) == which, "frame in both halves: " + f)
    need(len(old) >= 260, "only %d train frames" % len(old))
    need(len({w[0] for w in wordings}) == len(wordings), "a wording twice")
    need(len(new_wordings) >= 60, "too few new wordings")

    # One text with marked room and numbers must have one action.
    acts = {}
    for _, a, c in train + known + new:
        key = (frame(c), a["device"])
        need(acts.setdefault(key, a["action"]) == a["action"], "two actions for %s %s" % key)

    rooms = set(ROOM_WORDS) | {"all", None}
    strings = {a["value"] for _, a, _ in train}
    for t, a, _ in train + known + new:
        need(list(a) == ["device", "room", "action", "value"], "keys: " + t)
        need(a["action"] in ACTIONS[a["device"]], "action: " + t)
        need(a["room"] in rooms, "room: " + t)
        need(a["value"] is None or type(a["value"]) in (int, str), t)
        if isinstance(a["value"], str):
            need(a["value"] in strings, "value not in train: " + t)
        need(t == t.strip() and "{" not in t and "  " not in t, "form: " + t)
    for key, names in (("device", ACTIONS), ("room", rooms), ("action", {x for v in ACTIONS.values() for x in v})):
        for name in names:
            n = sum(a[key] == name for _, a, _ in train)
            need(n >= 20, "%s %s only %d times in train" % (key, name, n))
    tested = [a for _, a, _ in known + new]
    for key, least in (("device", 6), ("room", 4), ("action", 4)):
        for name in {a[key] for _, a, _ in train}:
            n = sum(a[key] == name for a in tested)
            need(n >= least, "%s %s only %d times in test" % (key, name, n))
    print("train %d rows, %d wordings, %d frames, %d with a typo" % (len(train), len(wordings), len(old), typos))
    print("test %d known, %d new (of %d new wordings)" % (len(known), len(new), len(new_wordings)))


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    for name, rows in zip(("train.jsonl", "test.jsonl"), build()):
        data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        path = os.path.join(here, name)
        if "--check" in sys.argv[1:]:
            with open(path, encoding="utf-8", newline="") as f:
                need(f.read() == data, name + " is not what write.py writes")
        else:
            with open(path, "w", encoding="utf-8", newline="\n") as f:
                f.write(data)


if __name__ == "__main__":
    main()
