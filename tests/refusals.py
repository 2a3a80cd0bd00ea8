"""Commands that are refused: the exit code, the command, a part of its line, and what is in the file that it names first.

The table of test_failures.py. A row is a line: CODE COMMAND => LINE <= CONTENT. In the content, \\n ends a line; an Arrow file has rows of JSON.
"""

SHORT = {
    "SET": "train small.json -o run --set",
    "SLIDE": "encode slide.arrow -m ./slide -o out.arrow",
    "LINES": "encode given.jsonl -m ./model -o out.arrow",
    "IDS": "encode given.arrow -m ./model -o out.arrow",
    "MASKED": "train small.json -o run --set train.objective=masked --set model.causal=false --set model.position=rope --set",
    "INIT": "train --init ./llama --data x.parquet --seq-len 32 --steps 1 -o run --set",
    "TOO_LONG": "train longnet-125m --data x.parquet --seq-len 4Mi --chunk 4Mi --steps 1 --set train.batch_tokens=4Mi -o run",
}

REFUSALS = r"""
3 score none.txt => none.txt: no such file
3 score picture.png => picture.png: neither Arrow, Parquet nor UTF-8 text
3 score empty.txt --format json => no token could be scored: every document is empty
3 score ids.parquet -m ./model => row 3, offset 1: token id 300 does not fit a vocabulary of 257
2 score x.parquet --column body => there is no column 'body'; its columns are id: int64
2 score x.parquet -m ./model --tokenizer large.json => large.json: not the tokenizer of the model
2 score x.parquet -m ./model --tokenizer large.json --tokenizer-differs => the tokenizer has 265 ids and the model 257
2 score x.parquet -m no-such-model.gguf => unknown model 'no-such-model.gguf'
2 score x.parquet --max-length 64 => there is no --max-length here: it is --context
2 generate x --max-length=64 => there is no --max-length here: it is --max-tokens
2 generate x --max-new-tokens 64 => there is no --max-new-tokens here: it is --max-tokens
2 encode x.parquet --batch-size 8 => there is no --batch-size here: batches are made by --chunk
2 score x.parquet -o v.npy => -o v.npy: .npy is not written: the name of a file ends in .arrow, .feather
2 tokenize x.parquet -o v.npy => an array of NumPy (.npy) holds one vector for each row
2 tokenize x.parquet --resume -o - => only a folder of shards can be resumed
2 encode x.parquet --resume -o out.arrow => out.arrow: only a folder of shards can be resumed
2 encode too-long.parquet -m ./llama -o vectors => 71 tokens, and the model was trained on 64: encode it in
2 encode x.parquet -m ./model --format jsonl -o out.arrow => and a file is what its name says: leave it out
2 encode x.parquet -o taken => taken exists and is not an empty folder
2 train longnet-tiny --data x.parquet -o x.parquet => x.parquet is a file, and -o names the folder of a run
2 train longnet-tiny --data x.parquet -o x.parquet/run => x.parquet is a file, and -o names the folder
2 train longnet-tiny --data x.parquet --output= => --output is empty
2 train --data x.parquet --steps 5 -o run => --steps and --seq-len make one stage together: give both
2 train --data x.parquet --seq-len 256 --steps 5 --pattern window:8 -o run => there is no model: give a RECIPE (longnet-1m,
2 train none => longnet-tiny; a path ends in .toml
2 train other/my.toml => no recipe 'other/my.toml': no such file. Shipped recipes:
2 train -o run => there is no run in run
2 train longnet-tiny --pattern window:8 --data x.parquet --seq-len 32 --steps 1 -o run --nproc 1k => 1000 ranks cannot share a window of 32 tokens: --sp 32 or less would fit
2 train longnet-tiny --pattern window:8 --data x.parquet --seq-len 32 --steps 1 -o run --nproc 4 --sp 3 => dp x sp is 1 x 3, which needs 3 processes, and there are 4: 4 x 1, 2 x 2, 1 x 4 would fit
2 train longnet-tiny --data x.parquet -o run --set lora.rank=4 => lora is for a Hugging Face model (init)
5 TOO_LONG => the largest part for activations, and
5 TOO_LONG --set model.num_layers=9999 => no chunk fits: choose shorter windows, a smaller model
2 train small.json -o run --dry-run --dp 3 => which 3 groups of ranks cannot share equally: --dp 1 would
2 generate x -m ./model --save-state new/state --state nonsense => nonsense
2 tokenize x.parquet --shard-tokens 9 -o out.arrow => --shard-tokens is for a folder of shards
2 score x.parquet --token-logprobs - => --token-logprobs needs a file
2 score x.parquet --token-logprobs v.jsonl.gz => --token-logprobs v.jsonl.gz: .gz is not written
2 score x.parquet --resume => --resume is for a folder of rows
2 score x.parquet -o y.parquet --resume => only a folder of shards can be resumed
2 score x.parquet -o y --token-logprobs z.arrow => --token-logprobs is for scores that are printed
2 score x.parquet -o y --format json => --format is for scores that are printed
2 score x.parquet -o x.parquet => x.parquet, which this command reads
2 score x.parquet -o v.csv => -o v.csv: .csv is not written: the name of a file ends in .arrow, .feather, .parquet or .jsonl
2 score x.parquet --dry-run --format jsonl => give --format text or json
2 score x.parquet -m ./model --pattern windw:1Ki => --pattern: unknown pattern 'windw': did you mean 'window'?
2 bench --pattern windw:1Ki => --pattern: unknown pattern 'windw': did you mean 'window'?
2 train --pattern windw:1Ki -o run => --pattern: unknown pattern 'windw': did you mean 'window'?
2 encode x.parquet -m ./encoder --prefix x -o y.arrow => nothing before a document: leave out --prefix
2 encode x.parquet -m ./encoder --dims 33 -o y.arrow => --dims 33: a vector of this model has 1 to 16 numbers
2 score x.parquet --token-logprobs y.arrow --dp 2 => leave out --dp
2 score - --dp 2 => stdin can be read by one process
2 score - --share 1/2 => stdin can be read by one process
2 encode @- --share 1/2 -o v => stdin can be read by one process
2 score long.txt --share 1/2 --dp 2 => --share is for one process
2 encode long.txt --share 1/2 -o v --sp 2 => --share is for one process
2 score long.txt --share 1/2 --nproc 2 => --share is for one process
2 tokenize long.txt --share 1/2 -o v --train-vocab 300 => a tokenizer is trained on all of the input
2 convert longnet-tiny -o y => give the type
4 convert longnet-nosuch --dtype bf16 -o y => no such file
2 convert ./llama --dtype bf16 -o y => already a Hugging Face model folder
3 generate => stdin: nothing came
2 train --init longnet-tiny --pattern finding --data x.parquet --seq-len 64 --steps 1 -o run --nproc 2 => chosen blocks have no gradient: train with a window (model.pattern)
2 train small.json -o run --dry-run --spill none => --spill none: no such folder
2 train -o chosen-run --dry-run => chosen blocks have no gradient
2 score ids.parquet -m ./model --sp 1e18 => 1000000000000000000 processes, and this machine has
2 encode ids.parquet --span sentence -o out.arrow => ids.parquet, row 0: this is no text with a sentence
2 generate - -i y.txt => PROMPT - is stdin, and --input is given
2 generate x --state taken => taken: no state, manifest.json is missing
2 generate x --top-p 0.9 => --top-p needs a temperature above 0
2 generate x --seed -1 => --seed -1 is not a number from 0
2 generate x --chat => no chat template
3 generate -i missing.txt => missing.txt
2 ask x.jsonl long.txt -m ./model => long.txt: name files, folders or -, and write the question last
2 ask first -m ./model => first: name files, folders or -, and write the question last, in quotes
2 ask x.jsonl first -m ./model --passages 0 => the passages must be 1 or more, not 0
2 ask x.jsonl first -m ./model --index long.txt => long.txt: file is not a database
2 ask x.jsonl first -m ./model --index x.jsonl => --index x.jsonl is x.jsonl, which this command reads
2 ask empty.txt first -m ./model --index empty.txt => --index empty.txt is empty.txt, which this command reads
2 ask x.jsonl first --max-tokens 9 => --max-tokens is for a model's answer: give --model
2 ask x.jsonl first --temperature 1 => --temperature is for a model's answer: give --model
2 ask x.jsonl first --stop x => --stop is for a model's answer: give --model
2 ask x.jsonl first --chunk 9 => --chunk is for a model's answer: give --model
2 ask x.jsonl first --system x => --system is for a model's answer: give --model
2 ask x.jsonl first -m ./model --top-p 0.5 => --top-p needs a temperature above 0
1 ask x.jsonl xyzzy -m ./model => no passage has any word of the question
2 ask ids.parquet first -m ./model => no column named text with text: choose one (--column)
2 ask x.jsonl -m ./model --questions x.parquet => there is no column 'question'; its columns are id: int64
2 ask x.jsonl first -m ./encoder => it cannot generate
2 pattern finding:exact=128 => finding has no option 'exact'
2 pattern windw:1Ki => unknown pattern 'windw': did you mean 'window'?
2 pattern window:1Ki,sinks=2Ki => window:1Ki,sinks=2Ki: sinks must be from 0 to the first segment length
2 pattern 1Ki/1,4Ki/4,queries=all => 1Ki/1,4Ki/4,queries=all: queries="all" needs overlap="once"
2 pattern paper --seq 2e18 => paper, 2000000000000000000 tokens: nothing is described beyond 2^60 tokens
2 pattern 1Ki/1,1Gi/4,overlap=once => overlap=once: its segments see each other in 1048577 parts
2 pattern window:8,look_back=1e9 => window:8,look_back=1G: its segments see each other in 1000000001 parts
2 plot given.json -o x.txt => x.txt: a picture's name ends in .png, .svg, .pdf <= {"step": 1, "loss": 2}\n
3 score bad.jsonl -o out.arrow => bad.jsonl, line 2: 'text' is not text
3 tokenize bad.jsonl -o out.arrow => bad.jsonl, line 2: 'text' is not text
3 tokenize bad.gz -o out.arrow => bad.gz: the gzip data is damaged or truncated (
3 tokenize none bad.gz --skip-bad -o out.arrow => nothing to tokenize: every document is left out
3 encode empty.jsonl -o out.arrow => there is nothing to encode: every document is empty or left out
3 score none --skip-bad => every document is empty or left out
2 score @- - => stdin (-) can be read only once
2 score x.arrow --keep n,titel --skip-bad -o out.arrow => x.arrow: there is no column 'titel'; its columns
2 score x.arrow --keep n,doc.titel --skip-bad -o out.arrow => x.arrow: there is no column 'doc.titel'; its columns
2 score x.stream --keep n,titel --skip-bad -o out.arrow => x.stream: there is no column 'titel'; its columns
2 score x.stream --keep n,doc.titel --skip-bad -o out.arrow => x.stream: there is no column 'doc.titel'; its columns
2 score x.parquet --keep n,titel --skip-bad -o out.arrow => x.parquet: there is no column 'titel'; its columns
2 score x.parquet --keep n,doc.titel --skip-bad -o out.arrow => x.parquet: there is no column 'doc.titel'; its columns
2 score x.jsonl --keep n,titel --skip-bad -o out.arrow => x.jsonl: there is no column 'titel'; its columns
2 score x.jsonl --keep n,doc.titel --skip-bad -o out.arrow => x.jsonl: there is no column 'doc.titel'; its columns
2 score x.parquet --keep n => --keep carries columns to rows: give -o, or --format
2 score types.arrow --keep kind --format json => --keep kind: the output has a column of this name
2 score types.arrow --keep ppl --format json => --keep ppl: the output has a column of this name
2 encode types.arrow --keep span -o out.arrow => --keep span: the output has a column of this name
2 encode types.arrow --keep ends -o out.parquet => out.parquet: Parquet does not hold a column (Unhandled type
2 encode types.arrow --keep days -o out.parquet => out.parquet: Parquet does not hold a column (Unhandled type
2 tokenize chat.jsonl -o out.arrow => 'messages' holds chats, which need the chat template of a tokenizer:
2 tokenize chat.jsonl --tokenizer longnet-tiny -o out.arrow => no chat template (chat_template.jinja, or chat_template in tokenizer_config.json) for chats
2 tokenize chat.jsonl --train-vocab 300 -o out.arrow => no column named text with text: choose one (--column)
2 score long.txt -m ./llama => 65 tokens, and the model was trained on 64: score it in windows (--context 64 --stride 32), or give --pattern window:32,sinks=4 (a window and 4 sinks) or --pattern dense (farther than trained); --skip-bad leaves such documents out
2 encode long.txt -m ./llama -o out.arrow => 66 tokens
2 score ids.parquet -m ./llama --chunk 8 --format jsonl => ids.parquet, row 2: 70 tokens
2 score ids.arrow -m ./llama --chunk 8 --format jsonl => ids.arrow, row 2: 70 tokens
2 encode ids.parquet -m ./llama -o out.arrow => ids.parquet, row 2: 71 tokens
3 score ids.parquet -m ./llama --context 8 => ids.parquet, row 3, offset 1: token id 300 does not fit
3 score too-long.parquet -m ./llama --skip-bad => every document is empty or left out
2 score x.parquet --context 8,8 => each context may be given once
2 score x.parquet --context 8,4 --stride 6 => a stride of 6 tokens needs a context of 6 or more, not 4
2 score x.parquet -m ./model --pattern 8/1,12/1 => use position="rope"
2 score x.parquet -m ./encoder => bidirectional
2 score x.parquet -m ./llama --nproc 2 => in one process
2 data inspect x.parquet --tokenizer nope.json => nope.json
2 convert longnet-tiny -o out --dtype fp32 --heads 4 => --heads: only for a checkpoint
2 score x.parquet -m longnet-tny => unknown model 'longnet-tny': no folder here has this name; shipped with weights: longnet-tiny
2 score x.parquet -m longnet-125m => unknown model 'longnet-125m': no folder here has this name; shipped with weights: longnet-tiny
4 score x.parquet -m . => config.json and model.safetensors missing
4 score x.parquet -m .. => config.json and model.safetensors missing
4 score x.parquet -m ./none => no such folder
4 score x.parquet -m ./long.txt => not a folder
4 score x.parquet -m ./taken => config.json and model.safetensors missing
4 score x.parquet -m ./half => not a complete model, model.safetensors missing
2 score https://x/a.toml => https://x/a.toml: web addresses are not read: download it first, or `curl
2 plot https://x/a.toml => https://x/a.toml: web addresses are not read: download it first, or `curl
2 train https://x/a.toml => https://x/a.toml: web addresses are not read: download it first, or `curl
2 score x.parquet -m https://x/a.toml => https://x/a.toml: web addresses are not read: download it first, or `curl
2 score x.parquet --tokenizer https://x/a.toml => https://x/a.toml: web addresses are not read: download it first, or `curl
2 score HTTP://x => web addresses are not read
2 score list.txt @list.txt => web addresses are not read <= http://x\n
3 score *.csv => no file matches
3 score taken => nothing readable
3 score @none.txt => cannot read the list
3 score - => nothing came
2 encode long.txt --keep n -o out.arrow => column 'n' is asked for, and this is plain text
3 LINES => line 2: 'text' is not text <= {"text": "a"}\n{"text": 1}\n
3 LINES => line 2: there is no 'text' <= {"text": "a"}\n{"txt": "a"}\n
3 LINES => line 2: 'text' is null <= {"text": "a"}\n{"text": null}\n
3 LINES => line 6: 'text' is not text <= {"text": "a"}\n\n \n{"text": "b"}\n\n{"text": 1}\n
3 LINES => (the last line is not whole <= {"text": "a"}\n{"text": "b
3 LINES => line 2: not a JSON object <= {"text": "a"}\n["b"]\n
3 LINES => line 2: 'text' holds half of a surrogate pair at character 0 <= {"text": "a"}\n{"text": "\ud800"}\n
3 LINES => line 2: 'id' is not text or an integer <= {"text": "a", "id": 1}\n{"text": "a", "id": 1.5}\n
3 LINES => line 2: 'ids' holds something that is not a token id <= {"ids": [1]}\n{"ids": [1, 2.0]}\n
3 LINES => line 2: 'ids' holds something that is not a token id <= {"ids": [1]}\n{"ids": [true, 1]}\n
3 LINES => line 2: 'ids' holds something that is not a token id <= {"ids": [1]}\n{"ids": ["1"]}\n
3 LINES => line 2: 'ids' holds something that is not a token id <= {"ids": [1]}\n{"ids": [1e99]}\n
3 LINES => line 2: 'ids' holds something that is not a token id <= {"ids": [1]}\n{"ids": [1000000000000000000000000000000]}\n
3 LINES => line 2, offset 1: the token id is null <= {"ids": [1]}\n{"ids": [2, null]}\n
3 LINES => line 2, offset 2: token id -4 is negative <= {"ids": [1]}\n{"ids": [2, 3, -4]}\n
3 LINES => line 2, offset 0: token id 257 does not fit <= {"ids": [1]}\n{"ids": [257]}\n
3 LINES => no text, token ids or chat under text, input_ids, tokens, token_ids, ids, messages; its keys are body, n: choose one (--column) <= {"body": "a", "n": 1}\n
3 LINES => given.jsonl, line 1: not JSON Lines of documents: not JSON <= hello
3 LINES => given.jsonl, line 1: 'text' is null <= {"text": null}\n{"text": "a"}\n
3 score a.fa => a.fa: FASTA is not read: make JSON Lines of it <= >x\nACGT\n
2 tokenize - --train-vocab 300 -o out => stdin
2 tokenize x.parquet --train-vocab 300 --tokenizer longnet-tiny -o out => not both
2 tokenize x.parquet --train-vocab 300 --tokenizer bytes -o out => not both
2 encode x.parquet --span word -o out => span must be a size, or one of sentence, paragraph, passage, not
2 tokenize x.parquet --tokenizer no-end.json --eos -o out => --eos
2 tokenize ids.parquet -o out => input_ids
3 SLIDE --tile-size 32 => is outside the grid of 50 x 50 of 32 pixels
2 SLIDE --eos 0 => reads vectors, which have no tokens: leave out --eos
2 SLIDE --bos 0 --tokenizer bytes => leave out --tokenizer, --bos
2 SLIDE --tokenizer bytes --tokenizer-differs => leave out --tokenizer, --tokenizer-differs
2 SLIDE --span 8 --pool cls => a span has no CLS of its own
2 SLIDE --column coords => column 'coords' does not hold vectors
2 encode slide.arrow -o out.arrow => no column named input_ids
2 encode long.txt -o out.arrow --pool cls => this model has no CLS
2 encode long.txt -o out.arrow --tile-size 8 => this model has no grid of tiles
3 encode long.txt -m ./slide -o out.arrow => this is text, and the model reads vectors
2 score long.txt -m ./slide => it reads vectors, not tokens
2 generate text -m ./slide => it reads vectors, not tokens
2 convert slide.pth -o out --heads 5 => dim 32 is not divisible by num_heads 5
2 convert slide.pth -o out --segment-lengths 8,16 => dilation_rates
2 convert encoder.pth -o out --heads 16 => give --segment-lengths, --dilation-rates
4 convert long.txt -o out => long.txt: by its first bytes neither a GGUF file nor a checkpoint
4 convert none.gguf -o out => none.gguf: no such file
4 convert nan.pth -o out => norm.weight has numbers that are NaN
3 plot given.json => row 2: not JSON <= {"step": 1}\nnonsense\n{"step": 2}\n
3 plot given.json => row 2: not a line of metrics <= {"step": 1}\n[2]\n
3 plot given.json => row 1: not a line of metrics <= {"loss": 1}\n
3 plot given.json => row 1: not a line of metrics <= {"step": "1"}\n
3 plot given.json => no line of metrics yet <= {"step"
3 plot given.json => nothing to draw <= {"step": 1, "loss": null}\n
3 plot none.json => No such file
3 plot given.json => row 1: not JSON <= | op | impl |\n
2 train given.json -o run => given.json: not a recipe, which is a table of keys and values <= []
2 train ./given.py -o run => given.py: not TOML:  <= import os
2 train given.json -o run => given.json: not JSON:  <= {
2 train given.toml -o run => given.toml: model, data, train and optimizer are tables <= data = 3\n[train]\n[model]\n
2 train small.json -o run --column words => there is no column 'words'
2 train small.json -o run --steps 5 => --steps and --seq-len make one stage together: give both (the recipe's --seq-len is 32)
2 train small.json -o run --seq-len 64 => give both (the recipe's --steps is 5)
2 train small.json -o model --init ./model => already holds a model
2 SET optimizer.ler=1 => unknown key 'optimizer.ler': did you mean 'optimizer.lr'?
2 SET data.tokenizer=none --set modle.dim=64 => small.json: unknown key 'modle': did you mean 'model'?
2 SET train.seq_len=1 => unknown key 'train.seq_len'
2 SET train.objective=contrast => train.objective: Input should be 'causal' or 'masked' (got 'contrast')
2 SET model.dim=15 => not divisible
2 SET model.causal=false --set model.position=rope => set train.objective = "masked"
2 SET train.objective=masked => set train.objective = "causal"
2 SET train.stages=[] => train.stages
2 SET data.train=[x.parquet] => data.train=[x.parquet]: texts in a list or a table have quotes: ['a', 'b']
2 SET data.train=[] => data.train
2 SET data.eos=nothing => data.eos:
2 SET data.tokenizer=./nothing => data.tokenizer:
2 train given.json -o run => given.json: missing key 'model.dim'; missing key 'model.num_layers'; <= {"model": {}, "data": {"tokenizer": "./nothing"}}
4 train --init ./nothing --data x.parquet --seq-len 32 --steps 1 -o run => init: nothing:
3 SET data.train=long.txt --set data.held_out=empty.jsonl => data.held_out, empty.jsonl: every
2 SET model.vocab_size=256 => model.vocab_size = 256 is less than the tokenizer needs, 257
2 SET optimizer.lr.x=1 => is a value, not a table
2 SET optimizer.lr=inf => optimizer.lr: Input should be a finite number
2 SET train.loss_jump=nan => train.loss_jump
2 SET optimizer.betas=[2,0.9] => optimizer.betas.0: Input should be less than 1
2 SET model.dim=1099511627776 => model.dim: Input should be less than or equal to 16777216
2 SET model.num_layers=1000000000000 => model.num_layers: Input should be less than or equal to 10000
2 SET model.rope_theta=inf => model.rope_theta: Input should be a finite number
2 SET model.vocab_size=0 => model.vocab_size = 0
2 SET schedule.decay=cosin => schedule.decay
2 SET train.seed=18446744073709551616 => train.seed
2 SET train.chunk=32kb => train.chunk: '32kb' is not a size
2 SET train.batch_tokens=0 => train.batch_tokens: Input should be greater than 0
2 score long.txt --dp 1k => 1000 processes, and this machine has
2 SET model.causal=false --set model.position=rope --set train.objective=masked --sp 2 => a bidirectional net over several ranks cannot keep the documents of a window apart
2 tokenize long.txt -o loop => loop: cannot write: Too many levels of symbolic links
2 encode long.txt -o loop => loop: cannot write: Too many levels of symbolic links
3 tokenize given.arrow -o v => given.arrow: it does not begin as the table that its name says <= ARROW1
3 tokenize given.pq -o v => given.pq: it does not begin as the table that its name says: it is a pointer of Git LFS <= version https://git-lfs.github.com/spec/v1
2 SET schedule.power=2 => schedule.power is of decay = "polynomial", not of "cosine"
2 generate x -m ./model --dry-run --format jsonl => --dry-run prints a table: leave out --format
2 generate -i x.jsonl -i long.txt --save-state new => --save-state saves one prompt, and
2 score long.txt --pattern window:16 --spill taken => --spill is for hidden states of bidirectional models
2 score long.txt --pattern window:16,chosen=4x8,chosen_every=8 --spill taken => --spill is for hidden states of bidirectional models
2 INIT model.dim=8 => with sizes of its own
2 INIT model.pattern=windw:8 => model.pattern: unknown pattern 'windw'
2 INIT train.objective=masked => train.objective
2 SET data.mix=[] => data.mix
2 SET data.mix=[{inputs=[],weight=1}] => data.mix.0.inputs
2 SET data.mix=[{inputs=["a"],weight=0}] => data.mix.0.weight
2 SET data.mix=[{inputs=["a"],weigth=1}] => did you mean 'data.mix.0.weight'?
2 SET optimizer.lr => write key=value
2 SET data.tokenizer=no-end.json => training puts it between documents
2 MASKED train.chunk=16 => train.chunk = 16 on 1 ranks is less than the longest seq_len, 32
2 MASKED model.vocab_size=257 => model.vocab_size = 257 is less than the tokens and the mask need, 258
3 IDS => given.arrow, row 1 <= {"ids": [1]}\n{"ids": null}
3 IDS => given.arrow, row 1, offset 1 <= {"ids": [1]}\n{"ids": [2, null]}
3 IDS => given.arrow, row 1 <= {"ids": 1}\n{"ids": null}
3 IDS => given.arrow, row 1: the value is null <= {"text": "a"}\n{"text": null}
3 IDS => given.arrow, row 0: the value is null <= {"text": null}\n{"text": "b"}
3 IDS => row 1, offset 1: token id 300 does not fit a vocabulary of 257 <= {"ids": [1]}\n{"ids": [2, 300]}
3 IDS => row 2, offset 1: token id -1 is negative <= {"ids": [1]}\n{"ids": []}\n{"ids": [2, -1]}
3 IDS => row 2, offset 0: token id 257 <= {"ids": 1}\n{"ids": 2}\n{"ids": 257}
3 IDS => row 0, doc_id: the value is null <= {"text": "a", "doc_id": null}\n{"text": "b", "doc_id": "b"}
3 IDS => given.arrow: doc_id has type double: text or whole numbers are needed <= {"text": "x", "doc_id": 0.5}
2 IDS => its columns are body: string, n: int64 <= {"body": "a", "n": 1}
2 IDS => its columns are input_ids: list <= {"input_ids": [1], "tokens": [1]}
2 IDS => its columns are text: string, ids: int64 <= {"text": "a", "ids": 1}
2 IDS => its columns are input_ids: list <= {"input_ids": ["a"]}
2 IDS --column nope => its columns are text: string <= {"text": "a"}
2 IDS --column x => its columns are text: string, x: double <= {"text": "a", "x": 1.5}
2 IDS --keep n => 'ids' is one stream of ids, in which a document has no row for 'n' <= {"ids": 1, "n": 1}\n{"ids": 256, "n": 2}
"""
