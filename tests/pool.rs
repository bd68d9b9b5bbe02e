//! Pools of images of the web: every published layout, searched as faiss searches it.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use ovenbird_cache::inputs::digest_path;
use ovenbird_stages::{
    Artifact as _,
    artifacts::{Dropped, Links},
};
use serde_json::{Value, json};

use crate::support::{World, copy};

const PIPELINE: &str = "version: 1
name: pool
stages:
  - id: retrieve
    use: pool/retrieve
    in: {pool: ./laion, prompts: ./prompts.safetensors, classes: ./classes.json}
    with: {split: all, per_class: 24}
";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pool")
}

/// A folder with the golden pools.
fn world() -> World {
    let world = World::new();
    copy(&golden(), &world.path("."));
    world
}

fn links(world: &World) -> Links {
    links_at(&world.find(&["links/links.parquet"]))
}

fn links_at(path: &Path) -> Links {
    Links::open(&digest_path(path, None, 0).unwrap()).unwrap()
}

/// Runs a pipeline in a home of its own.
fn retrieved(pipeline: &str) -> (Links, String) {
    let world = world();
    world.write("pool.yaml", pipeline);
    let output = world.run(["run", "./pool.yaml"]).success();
    (links(&world), output.stderr)
}

fn expected() -> Value {
    serde_json::from_slice(&fs::read(golden().join("expected.json")).unwrap()).unwrap()
}

fn urls(links: &Links) -> Vec<Vec<&str>> {
    links.by_class.iter().map(|(_, links)| Links::used(links).map(|(_, link)| link.url.as_str()).collect()).collect()
}

/// R1, R3 and R5: rows, cosines and order are those of faiss; duplicates, unsafe rows and rows without direction or URL are counted.
#[test]
fn every_layout_of_a_pool_gives_what_faiss_finds() {
    let expected = expected();
    let (of_laion, said) = retrieved(PIPELINE);
    assert_eq!(of_laion.by_class.iter().map(|(class, _)| class.as_str()).collect::<Vec<_>>(), ["ant", "bee", "cat", "dog", "eel"]);
    for ((class, links), hits) in of_laion.by_class.iter().zip(expected["hits"].as_array().unwrap()) {
        let hits = hits.as_array().unwrap();
        assert_eq!(links.len(), hits.len(), "{class}");
        for (link, hit) in links.iter().zip(hits) {
            assert_eq!(link.place, hit["place"].as_u64().unwrap(), "{class}");
            assert!((f64::from(link.similarity.unwrap()) - hit["similarity"].as_f64().unwrap()).abs() < 1e-6, "{class}");
            assert_eq!(Value::from(link.url.as_str()), expected["urls"][link.place as usize], "{class}");
            assert_eq!(link.caption.as_deref(), Some(format!("picture {}, über", link.place).as_str()));
        }
    }
    let dropped = |class: usize| of_laion.by_class[class].1.iter().map(|link| link.dropped).collect::<Vec<_>>();
    assert_eq!(dropped(0)[1], Some(Dropped::DuplicateUrl));
    assert_eq!(dropped(1)[3], Some(Dropped::DuplicateContent));
    let counts = of_laion.searched.clone();
    assert_eq!(json!(counts.rows), expected["rows"]);
    assert_eq!(json!(counts.candidates), expected["candidates"]);
    assert_eq!([json!(counts.unsafe_rows), json!(counts.without_url)], [expected["unsafe"].clone(), expected["without_url"].clone()]);
    assert_eq!([counts.bad_rows.zero, counts.bad_rows.nan, counts.bad_rows.infinite], [1, 1, 1]);
    assert!(said.contains("searched 116 of 120 images; 2 are unsafe for work, 2 have no URL"), "{said}");
    assert!(said.contains("1 embeddings are zero, 1 NaN and 1 infinite"), "{said}");

    // DataComp's layout; its digests are of other columns.
    let (of_datacomp, _) = retrieved(&PIPELINE.replace("./laion", "./datacomp").replace("24}", "24, array: b32_img}"));
    let places =
        |links: &Links| links.by_class.iter().map(|(_, links)| links.iter().map(|link| link.place).collect()).collect::<Vec<Vec<_>>>();
    assert_eq!(places(&of_datacomp), places(&of_laion));
    assert_eq!(of_datacomp.by_class[0].1[1].dropped, Some(Dropped::DuplicateUrl));
    assert_eq!(of_datacomp.searched, counts);

    // Embeddings alone, with metadata from HDF5.
    let import = "stages:
  - id: import
    use: pool/import
    in: {table: ./metadata.h5}
";
    let with_hdf5 = PIPELINE.replace("stages:\n", import).replace("{pool: ./laion,", "{pool: ./laion/img_emb, metadata: import.metadata,");
    let (of_hdf5, _) = retrieved(&with_hdf5);
    assert_eq!(of_hdf5, of_laion);
}

/// The URLs that RPL's own retrieval wrote.
#[test]
fn links_are_those_of_rpl_s_code() {
    let world = world();
    world.write("classes.json", r#"{"base": ["ant", "cat", "dog"], "novel": ["bee", "eel"]}"#);
    let pipeline =
        PIPELINE.replace("./laion", "./rpl").replace("./prompts.", "./rpl.").replace("all, per_class: 24", "base, per_class: 12");
    world.write("pool.yaml", pipeline);
    drop(world.run(["run", "./pool.yaml"]).success());
    let published: BTreeMap<String, Vec<u64>> = serde_json::from_slice(&fs::read(golden().join("rpl.json")).unwrap()).unwrap();
    let expected: Vec<Vec<String>> =
        published.values().map(|urls| urls.iter().map(|url| format!("http://images.example/{url}")).collect()).collect();
    assert_eq!(urls(&links(&world)), expected);
}

/// R2, and what a researcher may set.
#[test]
fn hits_are_as_many_as_there_are_and_as_near_as_is_asked() {
    let (all, said) = retrieved(&PIPELINE.replace("per_class: 24", "per_class: 300"));
    assert!(all.by_class.iter().all(|(_, links)| links.len() == 113), "120 rows without 3 bad ones, 2 unsafe and 2 without a URL");
    assert!(said.contains("fewer links than hits, without duplicates and dissimilar ones, of 5 classes: ant (111)"), "{said}");
    let (few, _) = retrieved(&PIPELINE.replace("24}", "24, limits: {bee: 3}, min_similarity: 0.4}"));
    assert_eq!(few.by_class[1].1.len(), 3);
    let hits = || {
        few.by_class
            .iter()
            .flat_map(|(_, links)| links)
            .filter(|link| !matches!(link.dropped, Some(Dropped::DuplicateUrl | Dropped::DuplicateContent)))
    };
    assert!(hits().all(|link| link.dropped.is_some() == (link.similarity.unwrap() < 0.4)));
    assert!(hits().any(|link| link.dropped.is_some()) && hits().any(|link| link.dropped.is_none()));
    let counts = |nsfw: &str| retrieved(&PIPELINE.replace("24}", &format!("24, nsfw: {nsfw}}}"))).0.searched;
    assert_eq!(counts("keep").unsafe_rows, 0);
    // NSFW, NSFW, UNSURE and one of which nothing is known.
    assert_eq!(counts("drop-unsure").unsafe_rows, 4);
}

#[test]
fn pools_that_do_not_fit_are_refused() {
    let world = world();
    let refuses = |from: &str, to: &str, expected: &str| world.refuses(PIPELINE, from, to, expected);
    refuses("./laion", "./datacomp", "arrays `b32_img`, `l14_img`: which?");
    refuses("24}", "24, limits: {cow: 3}}", "`limits` names `cow`, which is no class");
    refuses("./laion", "./laion/metadata", "expected embeddings `.npy` or `.npz` in the folder, found none among 3 files");
    refuses("./laion", "./laion/img_emb", "`img_emb/img_emb_0.npy` has no metadata beside it".trim_start_matches("`img_emb/"));
    refuses("pool: ./laion, ", "", "missing");
    refuses("per_class: 24", "per_class: 0", "expected from 1 to 100000, found 0");
    refuses("{pool: ./laion,", "{pool: ./laion, annotations: ./classes.json,", "given without `features`");
    let pairs = PIPELINE.replace("./laion", "./datacomp").replace("24}", "24, array: l14_img}");
    world.refuses(&pairs, "split: all", "split: base", "embeddings have 24 numbers, class embeddings 16");
    world.refuses(&pairs, "l14_img", "b16_img", "expected an array `b16_img`, found `b32_img`, `l14_img`");

    // One file of a pair is of another shard.
    let at = |name: &str| world.path(name);
    fs::copy(at("laion/metadata/metadata_2.parquet"), at("laion/metadata/metadata_1.parquet")).map(drop).unwrap();
    refuses("./laion", "./laion/.", "`img_emb/img_emb_1.npy` has 30 rows, `metadata/metadata_1.parquet` has 40");
    fs::remove_file(at("laion/metadata/metadata_1.parquet")).unwrap();
    refuses("./laion", "./laion", "`img_emb/img_emb_1.npy` has no metadata beside it");
    fs::copy(at("laion/metadata/metadata_0.parquet"), at("laion/metadata/metadata_7.parquet")).map(drop).unwrap();
    refuses("./laion", "./laion", "`metadata/metadata_7.parquet` has no embeddings beside it");
    fs::remove_dir_all(at("laion")).unwrap();
    copy(&golden().join("laion"), &at("laion"));
    let bytes = fs::read(at("laion/img_emb/img_emb_1.npy")).unwrap();
    world.write("laion/img_emb/img_emb_1.npy", &bytes[..bytes.len() - 32]);
    refuses("./laion", "./laion", "expected 960 bytes after the header");
    let place = bytes.windows(3).position(|three| three == b"<f2").unwrap();
    world.write("laion/img_emb/img_emb_1.npy", [&bytes[..place], b"<f8", &bytes[place + 3..]].concat());
    refuses("./laion", "./laion", "expected a matrix [N, D] of f16 or f32");
    world.write("laion/img_emb/img_emb_1.npy", "<html>");
    refuses("./laion", "./laion", "expected numpy's `.npy`");
    copy(&golden().join("laion"), &at("laion"));
    world.write("laion/metadata/metadata_1.parquet", "<html>");
    refuses("./laion", "./laion", "expected a Parquet table");
    // A table of something else.
    fs::copy(golden().join("rpl/metadata_0.parquet"), at("laion/metadata/metadata_1.parquet")).map(drop).unwrap();
    refuses("./laion", "./laion", "`img_emb/img_emb_1.npy` has 30 rows, `metadata/metadata_1.parquet` has 50");
}

/// A chunk that the file does not have any more reads as empty texts; and a URL that is no text.
#[test]
fn damage_in_hdf5_is_not_taken_for_rows_without_a_url() {
    let world = World::new();
    let bytes = fs::read(golden().join("metadata.h5")).unwrap();
    let pipeline = "version: 1
name: damaged
stages:
  - {id: import, use: pool/import, in: {table: ./metadata.h5}}
";
    world.write("damaged.yaml", pipeline);
    let (mut n_refused, mut n_same) = (0, 0);
    for place in (512..bytes.len()).step_by(bytes.len() / 40) {
        let mut damaged = bytes.clone();
        damaged[place] ^= 4;
        world.write("metadata.h5", &damaged);
        let output = world.run(["run", "./damaged.yaml"]);
        match output.code {
            4 => n_refused += 1,
            // What was hurt is of no row, or a letter.
            0 => n_same += 1,
            code => panic!("{place}: {code}: {}", output.stderr),
        }
        assert!(!output.stderr.contains("panicked") && !output.stderr.contains("bug in ovenbird"), "{place}: {}", output.stderr);
        assert!(!output.stderr.contains("16 of 120 rows have no URL"), "{place}: {}", output.stderr);
    }
    assert!(n_refused > 0 && n_same > 0, "{n_refused} {n_same}");
}

/// Images of one's own instead of a pool.
#[test]
fn images_of_one_s_own_are_retrieved_by_their_file_names() {
    let world = World::new();
    let pipeline = "version: 1
name: own
stages:
  - {id: world, use: toy/world, with: {train_images: 2, val_images: 2, web_images: 60, held_out_images: 60}}
  - {id: clip, use: toy/clip, in: {held_out_images: world.held_out_images, held_out: world.held_out}}
  - {id: prompts, use: prompts/ensemble, in: {checkpoint: clip.checkpoint, classes: world.classes}}
  - {id: list, use: annotations/folder, in: {images: world.web_images}}
  - {id: globals, use: clip/globals, in: {images: world.web_images, annotations: list.annotations, checkpoint: clip.checkpoint}}
  - id: own
    use: pool/retrieve
    in: {features: globals.features, annotations: list.annotations, prompts: prompts.prompts, classes: world.classes}
    with: {per_class: 5}
  - id: web
    use: toy/web
    in: {images: world.web_images, captions: world.captions, features: globals.features, annotations: list.annotations}
  - id: pooled
    use: pool/retrieve
    in: {pool: web.pool, prompts: prompts.prompts, classes: world.classes}
    with: {per_class: 5, nsfw: keep}
";
    world.write("own.yaml", pipeline);
    drop(world.run(["run", "./own.yaml"]).success());
    let of = |step: &str| {
        let exported = world.run(["export", "./own.yaml", &format!("{step}.links"), step]);
        drop(exported.success());
        links_at(&world.path(step).join("links.parquet"))
    };
    let (own, pooled) = (of("own"), of("pooled"));
    assert_eq!(own.by_class.len(), 20, "novel classes");
    for ((class, own), (_, pooled)) in own.by_class.iter().zip(&pooled.by_class) {
        assert_eq!(own.len(), 5);
        for (own, pooled) in own.iter().zip(pooled) {
            assert_eq!((own.place, own.url.clone()), (pooled.place, format!("{:08}.jpg", own.place)), "{class}");
            // The pool holds them in f16.
            assert!((own.similarity.unwrap() - pooled.similarity.unwrap()).abs() < 1e-3);
        }
    }
    world.refuses(pipeline, "annotations: list.annotations, prompts", "prompts", "missing, but `features` are given");
    world.refuses(pipeline, "{pool: web.pool,", "{pool: web.pool, features: globals.features,", "given beside `features`");
}

/// Links of a table alone, and what of a table is refused.
#[test]
fn tables_of_links_are_read_in_place_of_a_pool() {
    let world = World::new();
    let lines: String = (0..50).map(|row| format!("http://images.example/{}.jpg\tpicture {row}\n", row.min(47))).collect();
    world.write("cc12m.tsv", &lines);
    let pipeline = "version: 1
name: links
stages:
  - id: import
    use: pool/import
    in: {table: ./cc12m.tsv}
  - id: links
    use: pool/links
    in: {metadata: import.metadata}
    with: {class: bird, first: 10, n: 100}
";
    world.write("links.yaml", pipeline);
    drop(world.run(["run", "./links.yaml"]).success());
    let found = links(&world);
    assert_eq!((found.by_class[0].0.as_str(), found.by_class[0].1.len(), found.searched.rows), ("bird", 38, 40));
    assert_eq!(found.by_class[0].1[0].url, "http://images.example/10.jpg");
    assert_eq!(found.by_class[0].1[37].caption.as_deref(), Some("picture 47"));
    for (wrong, expected) in [
        (lines.replace("\tpicture 7\n", "\n"), "line 8: expected two fields with a tab between them, found 1"),
        (lines.replace("http://images.example/9.jpg", "9.jpg"), "line 10: expected a URL (http..) in field 1, found `9.jpg`"),
        (String::new(), "found an empty file"),
    ] {
        world.write("cc12m.tsv", wrong);
        world.refuses(pipeline, "name: links", "name: links", expected);
    }
    fs::create_dir(world.path("empty")).unwrap();
    world.write("empty/readme.txt", "nothing");
    world.refuses(
        &pipeline.replace("import.metadata", "./empty"),
        "n: 100",
        "n: 10",
        "expected tables `.parquet`, found none among 1 files",
    );
    world.write("wrong.h5", "not HDF5");
    world.refuses(pipeline, "./cc12m.tsv", "./wrong.h5", "expected HDF5");
}

/// A shard of four gigabytes, nearly all a hole, and a small one, two checkpoints: a run that is killed between them continues behind the first, to the same bytes.
#[test]
fn a_search_that_is_killed_continues_after_the_last_whole_shard() {
    const ROWS: [u64; 2] = [262_144, 4096];
    const D: usize = 8192;
    let world = World::new();
    let lines: String = (0..ROWS[0] + ROWS[1]).map(|row| format!("http://images.example/{row}\tpicture {row}\n")).collect();
    world.write("table.tsv", lines);
    // Rows that are not zero, with the number that follows a 1 in them: a smaller one is nearer to the query.
    let numbered = [(3_u64, 4.0), (90, 1.0), (260_000, 0.5), (ROWS[0] + 17, 0.25), (ROWS[0] + 4000, 2.0)];
    fs::create_dir(world.path("pool")).unwrap();
    for (shard, n_rows) in ROWS.into_iter().enumerate() {
        let header = format!("{{'descr': '<f2', 'fortran_order': False, 'shape': ({n_rows}, {D}), }}\n");
        let head = [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes()].concat();
        let file = fs::File::create(world.path(&format!("pool/img_emb_{shard}.npy"))).unwrap();
        (&file).write_all(&head).unwrap();
        file.set_len(head.len() as u64 + n_rows * 2 * D as u64).unwrap();
        let first = if shard == 0 { 0 } else { ROWS[0] };
        for (row, number) in numbered.iter().filter(|(row, _)| (first..first + n_rows).contains(row)) {
            let pair = [half::f16::ONE, half::f16::from_f64(*number)].map(half::f16::to_le_bytes).concat();
            file.write_all_at(&pair, head.len() as u64 + (row - first) * 2 * D as u64).unwrap();
        }
    }
    let header = json!({
        "__metadata__": {"names": r#"["ant", "bee"]"#},
        "embeddings": {"dtype": "F32", "shape": [2, D], "data_offsets": [0, 8 * D]},
    });
    let mut numbers = vec![0.0_f32; 2 * D];
    (numbers[0], numbers[D + 1]) = (3.0, 1.0);
    let text = header.to_string();
    let bytes: Vec<u8> = numbers.into_iter().flat_map(f32::to_le_bytes).collect();
    world.write("prompts.safetensors", [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &bytes].concat());
    world.write("classes.json", r#"{"base": ["ant"], "novel": ["bee"]}"#);
    let pipeline = "version: 1
name: pool
stages:
  - id: import
    use: pool/import
    in: {table: ./table.tsv}
  - id: retrieve
    use: pool/retrieve
    in: {pool: ./pool, metadata: import.metadata, prompts: ./prompts.safetensors, classes: ./classes.json}
    with: {split: all, per_class: 3}
";
    world.write("pool.yaml", pipeline);
    world.run_and_kill(&["run", "./pool.yaml"], &["pool/retrieve"]);
    let begun = world.units_of("pool/retrieve");
    assert_eq!(begun.len(), 1, "the first checkpoint");
    drop(world.run(["run", "./pool.yaml"]).success());
    let last = world.units_of("pool/retrieve").into_iter().find(|unit| !begun.contains(unit)).unwrap().join("links/links.parquet");
    let found = links_at(&last);
    let places = |class: usize| found.by_class[class].1.iter().map(|link| link.place).collect::<Vec<_>>();
    assert_eq!((places(0), places(1)), (vec![262_161, 260_000, 90], vec![3, 266_144, 90]));
    assert_eq!(found.by_class[0].1[0].url, "http://images.example/262161");
    assert_eq!((found.searched.rows, found.searched.bad_rows.zero), (ROWS[0] + ROWS[1], ROWS[0] + ROWS[1] - 5));
    let resumed = fs::read(&last).unwrap();
    fs::remove_dir_all(world.path(".ovenbird")).unwrap();
    drop(world.run(["run", "./pool.yaml"]).success());
    let whole = world.units_of("pool/retrieve").into_iter().map(|unit| fs::read(unit.join("links/links.parquet")).unwrap());
    assert!(whole.into_iter().any(|bytes| bytes == resumed), "the same bytes as in one go");

    // Metadata of fewer rows than there are embeddings.
    world.write("table.tsv", "http://images.example/0\tpicture 0\n".repeat(262_200));
    world.refuses(pipeline, "per_class: 3", "per_class: 2", "row 0 of `img_emb_1.npy` and those after it, 4096 in all, have no metadata");
}
