"""What every option of every command and every key of a recipe changes: the table that test_every_option.py runs.

The first line of a command is what its runs have in common; `@` gives a row another one. A row is

    OPTION  WHAT  one [| other] [@ common]

`one` and `other` (by default, nothing) are two ways to give the option. Of the two runs, WHAT differs:

    rows       the numbers and names that the command is for, in any format
    code       the exit code
    stdout, stderr, types (of columns and tensors), files (names of what is written)
    opened     the files and folders that are opened; asked: the addresses that are asked
    memory     the peak of the process, by megabytes; compiled: whether the compiler is loaded
    pieces     of tensors in checkpoints, how many
    processes  how many there are at a time; cpu: seconds of work, where they are more by far
    nothing    where an option only names the default: --ppl

and the rows are the same, unless they are what differs. Runs start in a folder beside `../in` and `../start`; of `+name`, a
copy of `../start/name` is in their folder. A row of a recipe has assignments instead of options.

`SAME` has what changes no number. Of each block, all commands give the rows of documents of the first one, or of the steps
of a run; `*` stands for the first one, and `<` for what its stdin is.
"""

READING = "../in/t.txt ../in/u.txt -m ../in/native"
LONG = "../in/long.txt -m ../in/native"
CHOSEN = "--pattern window:16,chosen=4x8,chosen_every=4"
ASKED = '../in/t.txt ../in/u.txt "the bear" -m ../in/native'
RANKS = """
--nproc    processes  --nproc 2
--sp       processes  --sp 2
--dp       processes  --dp 2
"""
DEVICE = """
--device   code       --device cuda:99 | --device cpu
"""

OPTIONS = {
    "": """

--version             stdout     --version | --help
""",
    "tokenize": """
../in/rows.jsonl -o out.jsonl
--output              files      -o out.jsonl | -o out.arrow @ ../in/rows.jsonl
--shard-tokens        files      --shard-tokens 20 @ ../in/rows.jsonl -o out
--shard-format        files      --shard-format parquet @ ../in/rows.jsonl -o out
--resume              code       --resume @ ../in/t.txt ../in/u.txt -o tokens --shard-tokens 20 +tokens
--column              rows       --column body
--id-column           rows       --id-column name
--keep                rows       --keep name
--skip-bad            code       --skip-bad @ ../in/bad.jsonl -o out.jsonl
--share               rows       --share 2/2
--tokenizer           rows       --tokenizer longnet-tiny
--update              asked      --update @ ../in/t.txt -o out.jsonl --tokenizer org/tiny
--train-vocab         rows       --train-vocab 265
--eos                 rows       --eos 65
--quiet               stderr     -q
""",
    "pattern": """
8/1,32/2 --format json
--seq                 rows       --seq 128
--heads               rows       --heads 3
--causal              rows       --bidirectional
--format              stdout     --format text | --format json @ 8/1,32/2
""",
    "convert": """
../in/native -o out --dtype fp32
--output              files      -o out | -o other @ ../in/native --dtype fp32
--dtype               types      --dtype float16 | --dtype fp32 @ ../in/native -o out
--heads               rows       --heads 8 @ ../in/slide.pth -o out
--segment-lengths     rows       --segment-lengths 16,32,64,128,256 @ ../in/slide.pth -o out
--dilation-rates      rows       --dilation-rates 1,2,4,8,9 @ ../in/slide.pth -o out
--padding             rows       --padding exact @ ../in/slide.pth -o out
--update              asked      --update @ org/tiny -o out --dtype fp32
--quiet               stderr     -q
""",
    "train": f"""
../in/recipe.json -o run
--recipe              stdout     --recipe
--set                 rows       --set optimizer.lr=0.1
--seq-len             rows       --seq-len 8 --steps 2 | --seq-len 16 --steps 2
--steps               rows       --seq-len 16 --steps 3 | --seq-len 16 --steps 2
--init                rows       --init ../in/init | --init ../in/native @ --data ../in/t.txt --seq-len 16 --steps 2 -o run
--update              asked      --update @ --init org/tiny --data ../in/t.txt --seq-len 8 --steps 1 -o run
--data                rows       --data ../in/u.txt
--tokenizer           rows       --tokenizer ../in/other.json
--tokenizer-differs   code       --tokenizer-differs @ --init ../in/init --data ../in/t.txt --tokenizer ../in/other.json --seq-len 16 --steps 2 -o run
--column              rows       --column body @ ../in/recipe.json -o run --data ../in/rows.jsonl
--eos                 rows       --eos 65
--output              files      -o run | -o other @ ../in/recipe.json
--resume              rows       --resume ../start/run
--no-resume           code       --no-resume @ ../in/recipe.json -o run +run
--dry-run             stdout     --dry-run
--format              stdout     --format json @ ../in/recipe.json --dry-run
--nproc               processes  --nproc 2
--sp                  processes  --sp 2
--dp                  processes  --dp 2
--shard               pieces     --shard full @ ../in/recipe.json -o run --nproc 2
--pattern             rows       --pattern 8/1
{DEVICE}
--dtype               rows       --dtype bfloat16
--chunk               memory     --chunk 16Ki | --chunk 1Ki @ ../in/recipe.json -o run --data ../in/long.txt --seq-len 16Ki --steps 1
--spill               opened     --spill ../in/spill @ ../in/recipe.json -o run --chunk 8
--quiet               stderr     -q
""",
    "plot": """
../in/metrics.jsonl
--tokenizer           code       --tokenizer ../in/other.json @ ../start/long.arrow
--output              files      -o p.svg
""",
    "score": f"""
{READING} --format jsonl
--tokenizer           rows       --tokenizer ../in/other.json --tokenizer-differs
--tokenizer-differs   code       --tokenizer-differs @ {READING} --tokenizer ../in/other.json
--column              rows       --column body @ ../in/rows.jsonl -m ../in/native --format jsonl
--id-column           rows       --id-column name @ ../in/rows.jsonl -m ../in/native --format jsonl
--keep                rows       --keep name @ ../in/rows.jsonl -m ../in/native --format jsonl
--eos                 rows       --eos 65 @ ../in/flat.parquet -m ../in/native --format jsonl
--bos                 rows       --bos none
--skip-bad            code       --skip-bad @ ../in/bad.jsonl -m ../in/native
--share               rows       --share 2/2 @ {READING} --format jsonl
--model               rows       -m ../in/init @ ../in/t.txt --format jsonl
--update              asked      --update @ ../in/t.txt -m org/tiny
--pattern             rows       --pattern window:8
--ppl                 nothing    --ppl
--context             rows       --context 16
--stride              rows       --stride 4 @ {READING} --format jsonl --context 16
--last                rows       --last 9
--by                  rows       --by name @ ../in/rows.jsonl -m ../in/native --format jsonl
--format              stdout     --format json | --format jsonl @ {READING}
--token-logprobs      files      --token-logprobs x.arrow
--top                 rows       --top 1 @ {READING} --format jsonl --token-logprobs x.arrow
--output              files      -o gains.jsonl | -o gains.arrow @ {READING}
--shard-format        files      --shard-format parquet @ {READING} -o out
--shard-tokens        files      --shard-tokens 20 @ {READING} -o out
--resume              code       --resume @ {READING} -o gains --shard-tokens 20 +gains
--dry-run             stdout     --dry-run @ {READING}
{RANKS}{DEVICE}
--dtype               rows       --dtype bfloat16
--chunk               memory     --chunk 16Ki | --chunk 1Ki @ {LONG}
--spill               code       --spill ../in/spill @ {READING} --format jsonl
--quiet               stderr     -q @ {READING} --format jsonl --pattern window:8
""",
    "encode": f"""
{READING} -o out.jsonl
--tokenizer           rows       --tokenizer ../in/other.json --tokenizer-differs
--tokenizer-differs   code       --tokenizer-differs @ {READING} -o out.jsonl --tokenizer ../in/other.json
--column              rows       --column body @ ../in/rows.jsonl -m ../in/native -o out.jsonl
--id-column           rows       --id-column name @ ../in/rows.jsonl -m ../in/native -o out.jsonl
--keep                rows       --keep name @ ../in/rows.jsonl -m ../in/native -o out.jsonl
--eos                 rows       --eos 65 @ ../in/flat.parquet -m ../in/native -o out.jsonl
--bos                 rows       --bos none
--skip-bad            code       --skip-bad @ ../in/bad.jsonl -m ../in/native -o out.jsonl
--share               rows       --share 2/2
--model               rows       -m ../in/init @ ../in/t.txt -o out.jsonl
--update              asked      --update @ ../in/t.txt -m org/tiny -o out.jsonl
--pattern             rows       --pattern window:8
--pool                rows       --pool last
--prefix              rows       --prefix "to find: "
--dims                rows       --dims 4
--span                rows       --span 16 | --span sentence
--context             rows       --context 16 @ ../in/t.txt -m ../in/encoder -o out.jsonl
--stride              rows       --stride 8 @ ../in/t.txt -m ../in/encoder -o out.jsonl --context 16
--normalize           rows       --no-normalize
--tile-size           rows       --tile-size 512 @ ../in/slide.parquet -m ../in/slide -o out.jsonl
--output              files      -o out.jsonl | -o out.parquet @ {READING}
--embedding-dtype     types      --embedding-dtype float16 @ {READING} -o out.arrow
--shard-rows          files      --shard-rows 1 @ {READING} -o out
--shard-format        files      --shard-format parquet @ {READING} -o out
--resume              code       --resume @ {READING} -o vectors --shard-rows 1 +vectors
--dry-run             stdout     --dry-run
--format              stdout     --format json @ {READING} --dry-run
{RANKS}{DEVICE}
--dtype               rows       --dtype bf16
--chunk               memory     --chunk 16Ki | --chunk 1Ki @ {LONG} -o out.jsonl
--spill               opened     --spill ../in/spill @ ../in/t.txt -m ../in/both -o out.jsonl --chunk 7
--quiet               stderr     -q
""",
    "generate": f"""
hello -m ../in/native -n 6 --format jsonl
--input               rows       -i ../in/t.txt | -i ../in/u.txt @ -m ../in/native -n 6 --format jsonl
--state               rows       --state ../start/state
--chat                rows       --chat
--tokenizer           rows       --tokenizer ../in/other.json --tokenizer-differs
--tokenizer-differs   code       --tokenizer-differs @ hello -m ../in/native -n 6 --tokenizer ../in/other.json
--column              rows       --column body @ -i ../in/rows.jsonl -m ../in/native -n 6 --format jsonl
--eos                 rows       --eos 65 @ -i ../in/flat.parquet -m ../in/native -n 6 --format jsonl
--bos                 rows       --bos none
--model               rows       -m ../in/init @ hello -n 6 --format jsonl
--update              asked      --update @ hello -m org/tiny -n 2
--pattern             rows       --pattern window:2 @ -i ../in/t.txt -m ../in/native -n 6 --format jsonl
--max-tokens          rows       -n 3 | -n 6 @ hello -m ../in/native --format jsonl
--temperature         rows       --temperature 9 --seed 1
--top-p               rows       --top-p 0.01 @ hello -m ../in/native -n 6 --format jsonl --temperature 9 --seed 1
--seed                rows       --seed 2 | --seed 1 @ hello -m ../in/native -n 6 --format jsonl --temperature 9
--stop                rows       --stop B --stop S --stop T --stop U --stop V @ hello -m ../in/native -n 60 --format jsonl --temperature 9 --seed 1
--format              stdout     --format jsonl | --format text @ hello -m ../in/native -n 6
--save-state          files      --save-state s
--dry-run             stdout     --dry-run @ hello -m ../in/native -n 6
{DEVICE}
--dtype               rows       --dtype bf16
--chunk               memory     --chunk 16Ki | --chunk 1Ki @ -i {LONG} -n 1
--spill               code       --spill ../in/spill
--quiet               stderr     -q
""",
    "ask": f"""
{ASKED} -n 6 --format json
--questions           stdout     --questions ../in/questions.jsonl | fox @ ../in/t.txt -m ../in/native -n 6
--column              rows       --column body @ ../in/rows.jsonl AAA -m ../in/native -n 6 --format json
--id-column           rows       --id-column name @ ../in/rows.jsonl fox -m ../in/native -n 6 --format json
--skip-bad            code       --skip-bad @ ../in/bad.jsonl good -m ../in/native -n 1
--index               files      --index i.sqlite
--vectors             rows       --vectors ../in/passages.arrow @ ../in/t.txt ../in/u.txt "the bear" --format json
--model               rows       -m ../in/init | -m ../in/native @ ../in/t.txt ../in/u.txt "the bear" -n 6 --format json
--update              asked      --update @ ../in/t.txt lazy -m org/tiny -n 2
--passages            rows       --passages 1
--system              rows       --system "Say no." @ ../in/t.txt ../in/u.txt "the bear" -m ../in/init -n 6 --format json
--max-tokens          rows       -n 3 | -n 6 @ {ASKED} --format json
--temperature         rows       --temperature 9 --seed 1
--top-p               rows       --top-p 0.01 @ {ASKED} -n 6 --format json --temperature 9 --seed 1
--seed                rows       --seed 2 | --seed 1 @ {ASKED} -n 6 --format json --temperature 9
--stop                rows       --stop B --stop S --stop T --stop U --stop V --stop t --stop H --stop M --stop F @ {ASKED} -n 60 --format json --temperature 9 --seed 1
--format              stdout     --format json | --format text @ {ASKED} -n 6
{DEVICE}
--dtype               rows       --dtype bf16 @ {ASKED} -n 60 --format json
--chunk               nothing    --chunk 8
--spill               code       --spill nowhere
--quiet               stderr     -q @ {ASKED} -n 6
""",
    "bench": f"""
--seq 64 --heads 1 --head-dim 8 --repeats 1 --format jsonl
--seq                 rows       --seq 32 | --seq 64 @ --heads 1 --head-dim 8 --repeats 1 --format jsonl
--impl                rows       --impl dense
--direction           rows       --direction backward
--repeats             cpu        --repeats 9000
--max-time            rows       --max-time 1e-9
--max-dense-time      rows       --max-dense-time 1e-9 @ --seq 64,128 --heads 1 --head-dim 8 --repeats 1 --format jsonl
--heads               rows       --heads 2
--head-dim            rows       --head-dim 16
--batch               rows       --batch 2
--causal              rows       --bidirectional
--pattern             rows       --pattern 8/1
--format              stdout     --format md
{DEVICE}
--dtype               rows       --dtype bf16
--chunk               rows       --chunk 16
--quiet               stderr     -q
""",
    "data inspect": """
../in/rows.jsonl --format json
--tokenizer           rows       --tokenizer longnet-tiny
--column              rows       --column body
--id-column           rows       --id-column group
--eos                 rows       --eos 65 | --eos 66 @ ../in/flat.parquet --format json
--format              stdout     --format text | --format json @ ../in/rows.jsonl
--quiet               stderr     -q @ ../in/t.txt ../in/t.txt --format json
""",
}

STAGE = """'train.stages=[{"seq_len":%d,"steps":%d}]'"""
WINDOW = f"model.segment_lengths=[8] model.dilation_rates=[1] model.look_back=1 {STAGE % (64, 2)}"
ONCE = "model.look_back=1 model.overlap=once"
MASKED = "model.causal=false train.objective=masked"
ROWS = "data.train=[../in/rows.jsonl]"
LORA = "model=null init=../in/llama lora.rank=2"

RECIPE = f"""

init                          rows       init=../in/init | init=../in/native @ model=null
model.vocab_size              rows       model.vocab_size=300
model.dim                     rows       model.dim=16
model.num_layers              rows       model.num_layers=2
model.num_heads               rows       model.num_heads=1
model.ffn_dim                 rows       model.ffn_dim=16
model.kv_heads                rows       model.kv_heads=1
model.ffn                     rows       model.ffn=swiglu
model.bias                    rows       model.bias=false
model.segment_lengths         rows       model.segment_lengths=[8,32]
model.dilation_rates          rows       model.dilation_rates=[1,4]
model.head_offsets            rows       model.head_offsets=grouped @ model.dim=12 model.num_heads=3
model.look_back               rows       model.look_back=1
model.overlap                 rows       model.overlap=once @ model.look_back=1
model.queries                 rows       model.queries=all @ {ONCE}
model.sinks                   rows       model.sinks=2 @ {ONCE}
model.chosen                  code       model.chosen=2 @ {WINDOW}
model.chosen_block            code       model.chosen_block=8 @ {WINDOW}
model.chosen_every            code       model.chosen_every=8 @ {WINDOW}
model.padding                 rows       model.padding=zero_key @ {MASKED} model.segment_lengths=[5,12]
model.causal                  rows       {MASKED}
model.position                rows       model.position=none
model.rope_theta              rows       model.rope_theta=2.0
model.norm                    rows       model.norm=pre
model.final_norm              rows       model.final_norm=false
model.tie_embeddings          rows       model.tie_embeddings=false
model.norm_eps                rows       model.norm_eps=1.0
model.dropout                 rows       model.dropout=0.5
data.train                    rows       data.train=[../in/u.txt]
data.mix.inputs               rows       'data.mix=[{{"inputs":["../in/u.txt"],"weight":1}}]' | 'data.mix=[{{"inputs":["../in/t.txt"],"weight":1}}]' @ data.train=null
data.mix.weight               rows       'data.mix=[{{"inputs":["../in/u.txt"],"weight":1}},{{"inputs":["../in/t.txt"],"weight":1}}]' | 'data.mix=[{{"inputs":["../in/u.txt"],"weight":1}},{{"inputs":["../in/t.txt"],"weight":9}}]' @ data.train=null
data.tokenizer                rows       data.tokenizer=../in/other.json
data.eos                      rows       data.eos=65
data.column                   rows       data.column=body @ {ROWS}
data.loss                     code       data.loss=answers
data.held_out                 rows       data.held_out=[../in/u.txt]
optimizer.lr                  rows       optimizer.lr=0.1
optimizer.betas               rows       optimizer.betas=[0.1,0.2]
optimizer.eps                 rows       optimizer.eps=1.0
optimizer.weight_decay        rows       optimizer.weight_decay=9.0
optimizer.clip                rows       optimizer.clip=1e-9
schedule.warmup_steps         rows       schedule.warmup_steps=3
schedule.decay                rows       schedule.decay=constant
schedule.power                rows       schedule.power=4.0 @ schedule.decay=polynomial {STAGE % (16, 4)}
schedule.final                rows       schedule.final=0.9
train.stages.seq_len          rows       {STAGE % (8, 3)}
train.stages.steps            rows       {STAGE % (16, 2)}
train.objective               rows       {MASKED}
train.mask_rate               rows       train.mask_rate=0.5 @ {MASKED}
train.batch_tokens            rows       train.batch_tokens=64
train.chunk                   memory     train.chunk=16384 | train.chunk=512 @ data.train=[../in/long.txt] {STAGE % (16384, 1)}
train.across_documents        rows       train.across_documents=true @ {ROWS}
train.dtype                   rows       train.dtype=bf16
train.spill                   opened     train.spill=../in/spill @ train.chunk=8
train.activation_checkpointing  memory   train.activation_checkpointing=false | train.activation_checkpointing=true @ data.train=[../in/long.txt] {STAGE % (16384, 1)} train.chunk=16384 model.num_layers=6
train.compile                 compiled   train.compile=true @ train.chunk=8
train.seed                    rows       train.seed=1
train.loss_jump               code       train.loss_jump=1e-9 @ optimizer.lr=1.0
train.log_every               rows       train.log_every=2
train.evaluate_every          rows       train.evaluate_every=2 @ data.held_out=[../in/u.txt]
train.held_out_context        rows       train.held_out_context=8 @ data.held_out=[../in/u.txt]
train.save_every              files      train.save_every=1 @ train.keep=9
train.save_minutes            files      train.save_minutes=1e-9 @ train.keep=9
train.keep                    files      train.keep=3 @ train.save_every=1
parallel.sp                   stderr     parallel.sp=2 | parallel.dp=2 @ --nproc 2
parallel.dp                   stderr     parallel.dp=2 | parallel.sp=2 @ --nproc 2
parallel.shard                pieces     parallel.shard=full @ --nproc 2
lora.rank                     rows       lora.rank=4 @ {LORA}
lora.alpha                    rows       lora.alpha=1.0 @ {LORA}
lora.dropout                  rows       lora.dropout=0.9 @ {LORA}
lora.target_modules           rows       lora.target_modules=[q_proj] @ {LORA}
"""

TEXTS = "../in/t.txt ../in/u.txt"
SPANS = "../in/rows.parquet -m ../in/native --span 10 --keep name,group"
GAINS = "-m ../in/native --context 16,64 --keep name"
SAME = f"""
score ../in/rows.jsonl {GAINS} --format jsonl
* --chunk 7
* --dp 2
score - <../in/rows.jsonl {GAINS} --format jsonl
score ../in/rows.parquet {GAINS} --format jsonl
score ../in/rows.jsonl {GAINS} --format json
score ../in/rows.jsonl {GAINS} -o out.jsonl
score ../in/rows.jsonl {GAINS} -o out.parquet
score ../in/rows.jsonl {GAINS} -o out --shard-tokens 20
score ../in/rows.jsonl {GAINS} -o out --shard-tokens 20 --dp 2

score {READING} --format jsonl
* --chunk 7
* --sp 2
score ../in/ids.arrow -m ../in/native --format jsonl
score - <../in/ids.arrow -m ../in/native --format jsonl
score {READING} -o gains --shard-tokens 20 --resume +gains

score {READING} --top 1 --token-logprobs x.arrow
* --chunk 32 --sp 2

score {READING} --format jsonl {CHOSEN}
* --chunk 7

score ../in/kept.parquet -m ../in/native --keep maps,large,times,bytes --format jsonl
* --chunk 7 --dp 2

score ../in/rows.jsonl -m ../in/llama --format jsonl
* --chunk 7
* --dp 2

encode {SPANS} -o out.jsonl
* --chunk 7
* --chunk 101
* --sp 2
* --dp 2
encode {SPANS} -o - --format jsonl
encode {SPANS} -o out.parquet
encode {SPANS} -o out --shard-rows 3
encode {SPANS} -o out --shard-rows 3 --chunk 32 --dp 2 --sp 2

encode {READING} --pool mean+last+first --no-normalize -o out.jsonl
* --chunk 1
* --chunk 101

encode {TEXTS} -m ../in/both --span 10 --pool mean+last+first --no-normalize -o out.jsonl
* --chunk 7
* --chunk 7 --spill ../in/spill

encode {TEXTS} -m ../in/both -o out.jsonl
* --chunk 40 --sp 2
* --chunk 1000 --sp 2

encode ../in/slide.parquet -m ../in/slide --no-normalize -o out.jsonl
* --chunk 37
* --chunk 37 --spill ../in/spill
* --chunk 40 --nproc 2

encode ../in/slide.parquet -m ../in/slide --pool cls -o out.jsonl
* --chunk 37

encode ../in/rows.jsonl -m ../in/encoder --span 10 --context 16 -o out.jsonl
* --chunk 32
* --dp 2
encode - <../in/rows.jsonl -m ../in/encoder --span 10 --context 16 -o out.jsonl
encode ../in/rows.parquet -m ../in/encoder --span 10 --context 16 -o out.parquet
encode ../in/rows.jsonl -m ../in/encoder --span 10 --context 16 -o out --shard-rows 3 --dp 2

tokenize ../in/rows.jsonl --keep name -o out.jsonl
tokenize - <../in/rows.jsonl --keep name -o out.jsonl
tokenize ../in/rows.parquet --keep name -o out.parquet
tokenize ../in/rows.jsonl --keep name -o out --shard-tokens 20

encode {READING} -o vectors --shard-rows 1
* --resume +vectors
* --resume +vectors --dp 2

tokenize {TEXTS} -o tokens --shard-tokens 20
* --resume +tokens

train ../in/recipe.json -o run
* --chunk 8
* --chunk 8 --spill ../in/spill
* --sp 2
* --dp 2
* --nproc 2 --shard full

train ../in/recipe.json -o run --chunk 8 --set model.dropout=0.1
* --set train.activation_checkpointing=true
"""
