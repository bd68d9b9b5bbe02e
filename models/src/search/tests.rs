use std::{fs, path::Path};

use half::f16;
use proptest::prelude::*;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{
    BadRows, Block, Call, Found, Hit, Measure, Product, Ranked, Rows, Search, Selection,
    kernels::{Buffers, dot, widen},
};
use crate::{Error, golden::unit};

/// How a search goes about it, which must not matter.
#[derive(Clone, Copy, Debug)]
struct Manner {
    product: Product,
    selection: Selection,
    block_rows: usize,
    n_threads: usize,
}

const PLAIN: Manner = Manner { product: Product::F32, selection: Selection::Host, block_rows: 4096, n_threads: 1 };

fn manners() -> impl Iterator<Item = Manner> {
    let products = [Product::F32, Product::Bf16];
    let of_product = |product| {
        [
            (Selection::Host, 1, 1),
            (Selection::Host, 7, 2),
            (Selection::Host, 4096, 3),
            (Selection::Device, 7, 1),
            (Selection::Device, 4096, 2),
        ]
        .map(|(selection, block_rows, n_threads)| Manner { product, selection, block_rows, n_threads })
    };
    products.into_iter().flat_map(of_product)
}

fn search(queries: &[f32], limits: &[usize], measure: Measure, manner: Manner) -> Search {
    let queries = Tensor::from_slice(queries).view([limits.len() as i64, -1]);
    let mut search = Search::new(&queries, limits, measure, manner.product, Device::Cpu).unwrap();
    search.n_rows_per_block(manner.block_rows);
    (search.queries.n_threads, search.queries.numbers_per_thread) = (manner.n_threads, 1);
    if manner.selection == Selection::Device {
        search.select_on_device();
    }
    search
}

fn found(mut search: Search, rows: Rows<'_>) -> Found {
    search.add(rows, 0, None).unwrap();
    search.found()
}

fn places(hits: &[Hit]) -> Vec<u64> {
    hits.iter().map(|hit| hit.place).collect()
}

/// Vectors of unit length as `make.py` makes them.
fn vectors(name: &str, n: usize, d: usize) -> Vec<f32> {
    let numbers: Vec<f32> = unit(name, n * d).collect();
    let normalised = |row: &[f32]| -> Vec<f32> {
        let length = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        row.iter().map(|value| (f64::from(*value) / length) as f32).collect()
    };
    numbers.chunks(d).flat_map(normalised).collect()
}

/// All rows, exactly, sorted; bad ones and those that are no candidates left out.
fn naive(queries: &[f32], limits: &[usize], measure: Measure, rows: &[f32], candidates: &[bool]) -> Vec<Vec<Hit>> {
    let d = queries.len() / limits.len();
    let of_query = |(query, &limit): (&[f32], &usize)| {
        let mut hits = Vec::new();
        for (place, row) in rows.chunks(d).enumerate() {
            let is_vector = row.iter().all(|value| value.is_finite()) && row.iter().any(|value| value.abs() > 0.0);
            if candidates[place] && is_vector {
                let score = match measure {
                    Measure::Cosine => dot(query, row) / dot(row, row).sqrt(),
                    Measure::InnerProduct => dot(query, row),
                };
                hits.push(Ranked(Hit { place: place as u64, score: (score as f32).clamp(f32::MIN, f32::MAX) + 0.0 }));
            }
        }
        hits.sort();
        hits.into_iter().take(limit).map(|Ranked(hit)| hit).collect()
    };
    queries.chunks(d).zip(limits).map(of_query).collect()
}

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/search").join(name);
    serde_json::from_slice(&fs::read(path).expect("the golden file is there")).unwrap()
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn integers(list: &Value) -> Vec<u64> {
    list.as_array().unwrap().iter().map(|number| number.as_u64().unwrap()).collect()
}

fn flat(lists: &Value) -> Vec<f64> {
    lists.as_array().unwrap().iter().flat_map(numbers).collect()
}

fn is_near(hits: &[Hit], expected: &Value) -> bool {
    hits.iter().zip(numbers(expected)).all(|(hit, expected)| (f64::from(hit.score) - expected).abs() < 1e-5)
}

#[test]
fn hits_are_those_of_faiss() {
    let golden = golden("faiss.json");
    let (rows, queries) = (vectors("search/rows", 20_000, 512), vectors("search/queries", 17, 512));
    for manner in manners().filter(|manner| manner.block_rows == 4096) {
        for measure in [Measure::InnerProduct, Measure::Cosine] {
            let found = found(search(&queries, &[100; 17], measure, manner), Rows::F32(&rows));
            for (query, hits) in found.hits.iter().enumerate() {
                assert_eq!(places(hits), integers(&golden["ids"][query]), "{manner:?}, {measure:?}: query {query}");
                assert!(is_near(hits, &golden["scores"][query]), "{manner:?}, {measure:?}: query {query}");
            }
        }
    }
}

#[test]
fn hits_of_chunks_hold_the_hits_of_all() {
    let golden = golden("faiss.json");
    let (rows, queries) = (vectors("search/rows", 20_000, 512), vectors("search/queries", 17, 512));
    let mut all: Vec<Vec<Ranked>> = vec![Vec::new(); 17];
    for (part, rows) in rows.chunks(5000 * 512).enumerate() {
        let mut search = search(&queries, &[300; 17], Measure::InnerProduct, PLAIN);
        search.add(Rows::F32(rows), 5000 * part as u64, None).unwrap();
        all.iter_mut().zip(search.hits()).for_each(|(all, hits)| all.extend(hits.into_iter().map(Ranked)));
    }
    for (query, mut hits) in all.into_iter().enumerate() {
        hits.sort();
        let best: Vec<u64> = hits[..100].iter().map(|Ranked(hit)| hit.place).collect();
        assert_eq!(best, integers(&golden["ids"][query]));
    }
}

#[test]
fn retrieval_is_lp_ovods() {
    let golden = golden("lp-ovod.json");
    let rows: Vec<f16> = flat(&golden["rows_f16"]).into_iter().map(|bits| f16::from_bits(bits as u16)).collect();
    let queries: Vec<f32> = flat(&golden["queries"]).into_iter().map(|value| value as f32).collect();
    let least = golden["tau"].as_f64().unwrap() as f32;
    let candidates: Vec<bool> = numbers(&golden["objectness"]).into_iter().map(|objectness| objectness as f32 >= least).collect();
    let limit = golden["limit"].as_u64().unwrap() as usize;
    for manner in manners() {
        let mut search = search(&queries, &[limit; 4], Measure::Cosine, manner);
        search.add(Rows::F16(&rows), 0, Some(&candidates)).unwrap();
        for (class, hits) in search.hits().iter().enumerate() {
            assert_eq!(places(hits), integers(&golden["hit_row"][class]), "{manner:?}: class {class}");
            assert!(is_near(hits, &golden["hit_cosine"][class]), "{manner:?}: class {class}");
        }
        // The two rows at the threshold: f32(0.6) stays, the next number below goes.
        let objectness: Vec<f32> = numbers(&golden["objectness"]).into_iter().map(|objectness| objectness as f32).collect();
        let at = |value: f32| objectness.iter().position(|objectness| objectness.to_bits() == value.to_bits()).unwrap();
        assert_eq!([candidates[at(least)], candidates[at(least.next_down())]], [true, false]);
    }
}

#[test]
fn no_manner_changes_a_bit() {
    let rows: Vec<f16> = vectors("search/bits", 6000, 48).into_iter().map(|value| f16::from_f32(3.0 * value)).collect();
    let queries = vectors("search/askers", 5, 48);
    for measure in [Measure::Cosine, Measure::InnerProduct] {
        let limits = [1, 10, 50, 300, usize::MAX];
        let expected = found(search(&queries, &limits, measure, PLAIN), Rows::F16(&rows));
        assert_eq!(expected.hits.iter().map(Vec::len).collect::<Vec<_>>(), [1, 10, 50, 300, 6000]);
        for manner in manners() {
            assert_eq!(found(search(&queries, &limits, measure, manner), Rows::F16(&rows)), expected, "{manner:?}");
        }
    }
}

/// Candidates are as many as bounds cannot tell apart, so they get exact scores during the call.
#[test]
fn rows_that_are_alike_are_told_apart_exactly() {
    let direction = vectors("search/alike", 1, 32);
    let noise = vectors("search/noise", 3000, 32);
    let rows: Vec<f32> = noise.iter().enumerate().map(|(place, value)| direction[place % 32] + 1e-4 * value).collect();
    for measure in [Measure::Cosine, Measure::InnerProduct] {
        let expected = naive(&direction, &[20], measure, &rows, &[true; 3000]);
        for manner in manners() {
            assert_eq!(found(search(&direction, &[20], measure, manner), Rows::F32(&rows)).hits, expected, "{measure:?}, {manner:?}");
        }
    }
}

/// The factors of the product are multiplied here in f64, so that what remains is (1) of the bound.
#[test]
fn the_bound_holds_and_is_near() {
    let (rows, queries) = (vectors("search/rows", 2000, 48), vectors("search/queries", 5, 48));
    let rows: Vec<f32> = rows.iter().enumerate().map(|(place, value)| value * (1.0 + (place / 48 % 7) as f32)).collect();
    for measure in [Measure::Cosine, Measure::InnerProduct] {
        let search = search(&queries, &[1; 5], measure, Manner { product: Product::Bf16, block_rows: 2000, ..PLAIN });
        let call = Call { rows: Rows::F32(&rows), first_place: 0, candidates: Vec::new() };
        let block = Block { call: &call, indices: (0..2000).collect() };
        let mut buffers: Buffers<i16> = Buffers::new(5, 48, 2000);
        let prepared = search.queries.prepare(&block, &mut buffers, 1);
        let floats = |tensor: &Tensor| Vec::<f32>::try_from(tensor.to_kind(Kind::Float).contiguous().view([-1])).unwrap();
        let (factors, rounded) = (floats(&search.factor), floats(&buffers.rows.view([2000, 48])));
        for (place, query) in search.queries.all.iter().enumerate() {
            let exact = |row: usize| {
                let (query, row) = (&queries[48 * place..][..48], &rows[48 * row..][..48]);
                dot(query, row) / if measure == Measure::Cosine { dot(row, row).sqrt() } else { 1.0 }
            };
            let apart = |row: usize| (dot(&factors[48 * place..][..48], &rounded[48 * row..][..48]) - exact(row)).abs();
            let most = (0..2000).map(apart).fold(0.0, f64::max);
            let slack = search.queries.slack(query, &prepared);
            assert!(most <= slack && slack < 8.0 * most, "{measure:?}: {most:.2e} {slack:.2e}");
        }
    }
}

#[test]
fn of_equal_rows_the_lower_place_goes_first() {
    let mut rows = vectors("search/rows", 300, 16);
    let queries = vectors("search/queries", 2, 16);
    let twin = queries[..16].to_vec();
    for place in [7, 3, 299, 150, 151, 20] {
        rows[place * 16..][..16].copy_from_slice(&twin);
    }
    for manner in manners() {
        let found = found(search(&queries, &[4, 1], Measure::Cosine, manner), Rows::F32(&rows));
        assert_eq!(places(&found.hits[0]), [3, 7, 20, 150], "{manner:?}");
        // Later calls with lower places: the lower place wins all the same.
        let mut backwards = search(&queries, &[4, 1], Measure::Cosine, manner);
        for first in (0..300).step_by(100).rev() {
            backwards.add(Rows::F32(&rows[first * 16..][..1600]), first as u64, None).unwrap();
        }
        assert_eq!(backwards.found(), found, "{manner:?}");
    }
}

#[test]
fn rows_that_are_no_vectors_are_counted_and_never_hits() {
    let mut rows = vectors("search/rows", 40, 8);
    rows[8..16].fill(0.0);
    rows[16..24].fill(-0.0);
    rows[24] = f32::NAN;
    rows[25] = f32::INFINITY;
    rows[8 * 20 + 7] = f32::NEG_INFINITY;
    // No candidate.
    rows[8 * 30] = f32::NAN;
    let candidates: Vec<bool> = (0..40).map(|row| row != 30).collect();
    let halves: Vec<f16> = rows.iter().map(|value| f16::from_f32(*value)).collect();
    for manner in manners() {
        for measure in [Measure::Cosine, Measure::InnerProduct] {
            for rows in [Rows::F32(&rows), Rows::F16(&halves)] {
                let mut search = search(&vectors("search/queries", 1, 8), &[100], measure, manner);
                search.add(rows, 0, Some(&candidates)).unwrap();
                assert_eq!(search.bad_rows(), BadRows { zero: 2, nan: 1, infinite: 1 }, "{manner:?}");
                let mut hits = places(&search.hits()[0]);
                hits.sort_unstable();
                assert_eq!(hits, (0..40).filter(|place| ![1, 2, 3, 20, 30].contains(place)).collect::<Vec<u64>>(), "{manner:?}");
            }
        }
    }
}

#[test]
fn a_search_goes_on_from_what_was_stored() {
    let (rows, queries) = (vectors("search/rows", 900, 24), vectors("search/queries", 3, 24));
    let mut rows = rows;
    rows[..24].fill(0.0);
    for manner in manners() {
        let new = || search(&queries, &[3, 40, 500], Measure::Cosine, manner);
        let uninterrupted = found(new(), Rows::F32(&rows));
        let mut first = new();
        first.add(Rows::F32(&rows[..24 * 333]), 0, None).unwrap();
        let stored: Found = serde_json::from_str(&serde_json::to_string(&first.found()).unwrap()).unwrap();
        let mut second = new().resume(stored).unwrap();
        second.add(Rows::F32(&rows[24 * 333..]), 333, None).unwrap();
        assert_eq!(second.found(), uninterrupted, "{manner:?}");
        assert_eq!(second.bad_rows().zero, 1);
    }
}

#[test]
fn numbers_at_the_ends_of_f32_are_ranked_too() {
    // Longer than f32 holds the square of, so short that it has none, and products beyond f32.
    let rows: Vec<f32> =
        [[3e38, 1e38], [1e38, 3e38], [1e-40, 2e-40], [2e-40, 1e-40], [-3e38, 3e38], [1.0, 1.0], [1e-22, 2e-22], [-1e-45, 0.0]].concat();
    let queries = [1.0, 0.5, 3e38, -3e38, 1e-40, 1e-42];
    for manner in manners() {
        for measure in [Measure::Cosine, Measure::InnerProduct] {
            for limit in [1, 3, 8] {
                let found = found(search(&queries, &[limit; 3], measure, manner), Rows::F32(&rows));
                assert_eq!(found.hits, naive(&queries, &[limit; 3], measure, &rows, &[true; 8]), "{manner:?}, {measure:?}, {limit}");
                assert_eq!(found.bad_rows, BadRows::default());
            }
        }
    }
}

#[test]
fn every_f16_is_widened_exactly() {
    let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let mut floats = vec![0.0; halves.len()];
    widen(&halves, &mut floats);
    for (half, float) in halves.into_iter().zip(floats) {
        assert!(float.to_bits() == half.to_f32().to_bits() || half.is_nan() && float.is_nan(), "{half:?}: {float}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let queries = Tensor::from_slice(&[1.0_f32, 0.0, 0.0, 1.0]).view([2, 2]);
    let new = |queries: &Tensor, limits: &[usize]| Search::new(queries, limits, Measure::Cosine, Product::F32, Device::Cpu);
    let message = |result: Result<Search, Error>| result.map(|_| ()).unwrap_err().to_string();
    let said = [
        message(new(&queries.to_kind(Kind::Half), &[1, 1])),
        message(new(&queries.view([4]), &[1, 1])),
        message(new(&Tensor::zeros([0, 2], (Kind::Float, Device::Cpu)), &[])),
        message(new(&Tensor::zeros([2, 0], (Kind::Float, Device::Cpu)), &[1, 1])),
        message(new(&(&queries / 0.0), &[1, 1])),
        message(new(&queries, &[1])),
        message(new(&queries, &[1, 0])),
    ];
    let expected = [
        "queries: expected f32 [Q, D], Q and D at least 1, found Half [2, 2]",
        "queries: expected f32 [Q, D], Q and D at least 1, found Float [4]",
        "queries: expected f32 [Q, D], Q and D at least 1, found Float [0, 2]",
        "queries: expected f32 [Q, D], Q and D at least 1, found Float [2, 0]",
        "queries: expected finite numbers, found inf in query 0",
        "limits of hits: expected 2, one for each query, found 1",
        "limits of hits: expected at least 1, found 0 for query 1",
    ];
    assert_eq!(said, expected);

    let hit = |place, score| Hit { place, score };
    let go_on = |hits: Vec<Vec<Hit>>| message(new(&queries, &[2, 2]).unwrap().resume(Found { hits, bad_rows: BadRows::default() }));
    let said = [
        go_on(vec![vec![]]),
        go_on(vec![vec![], vec![hit(1, 0.5), hit(2, 0.5), hit(3, 0.5)]]),
        go_on(vec![vec![], vec![hit(2, 0.5), hit(1, 0.5)]]),
        go_on(vec![vec![hit(1, f32::NAN)], vec![]]),
    ];
    let expected = [
        "hits to go on from: expected hits of 2 queries, found 1",
        "hits to go on from: expected at most 2 hits of query 1, found 3",
        "hits to go on from: expected hits of query 1 with finite scores, best first, found others",
        "hits to go on from: expected hits of query 0 with finite scores, best first, found others",
    ];
    assert_eq!(said, expected);

    let mut search = new(&queries, &[1, 1]).unwrap();
    let said = [
        search.add(Rows::F32(&[1.0, 2.0, 3.0]), 0, None).unwrap_err().to_string(),
        search.add(Rows::F16(&[f16::ONE; 4]), 0, Some(&[true])).unwrap_err().to_string(),
        search.add(Rows::F32(&[1.0; 4]), u64::MAX - 1, None).unwrap_err().to_string(),
    ];
    let expected = [
        "rows to search: expected rows of 2 numbers, found 3 numbers",
        "candidates: expected 2, one for each row, found 1",
        "rows to search: expected places below 2^64, found 2 rows from 18446744073709551614 on",
    ];
    assert_eq!(said, expected);
    search.add(Rows::F32(&[]), 0, None).unwrap();
    assert_eq!(search.hits(), [[], []]);
}

/// Numbers of few values, so that scores are often equal or nearly so, or of any size.
fn a_number() -> impl Strategy<Value = f32> {
    prop_oneof![4 => (-3_i8..4).prop_map(f32::from), 4 => -1.0_f32..1.0, 1 => prop::num::f32::ANY, 1 => Just(0.0)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_search_is_the_naive_one(
        d in 1_usize..20,
        numbers in prop::collection::vec(a_number(), 0..1200),
        queries in prop::collection::vec(prop_oneof![3 => -1.0_f32..1.0, 1 => prop::num::f32::NORMAL], 19 * 3),
        limits in prop::collection::vec(1_usize..30, 3),
        candidates in prop::collection::vec(prop::bool::weighted(0.8), 1200),
        cuts in prop::collection::vec(0_usize..1200, 3),
        as_f16 in any::<bool>(),
        manner in prop::sample::select(manners().collect::<Vec<_>>()),
        measure in prop::sample::select(vec![Measure::Cosine, Measure::InnerProduct]),
    ) {
        let n_rows = numbers.len() / d;
        let halves: Vec<f16> = numbers[..n_rows * d].iter().map(|value| f16::from_f32(*value)).collect();
        let rows: Vec<f32> = if as_f16 { halves.iter().map(|value| value.to_f32()).collect() } else { numbers[..n_rows * d].to_vec() };
        let mut search = search(&queries[..3 * d], &limits, measure, manner);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(n_rows)).chain([0, n_rows]).collect();
        cuts.sort_unstable();
        for range in cuts.windows(2).rev().map(|pair| pair[0]..pair[1]) {
            let numbers = range.start * d..range.end * d;
            let part = if as_f16 { Rows::F16(&halves[numbers]) } else { Rows::F32(&rows[numbers]) };
            search.add(part, range.start as u64, Some(&candidates[range])).unwrap();
        }
        prop_assert_eq!(search.hits(), naive(&queries[..3 * d], &limits, measure, &rows, &candidates));
    }
}
