//! The pictures of a report: of images that lie anywhere, chosen by how well the detections fit, and still named where they are gone.

use std::fs;

use ovenbird_data::{
    annotations::{Annotations, CategoryId, ImageId},
    evaluate::Detection,
};
use serde_json::json;

use crate::{evaluation::write_detections, support::World};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
const REPORTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reports");

const PIPELINE: &str = "version: 1
name: photos
stages:
  - id: globals
    use: clip/globals
    in: {images: PHOTOS, annotations: ./data/ann.json, checkpoint: ./clip.pt}
    with: {resize: square, clip: {precision: f32}}
    on_bad_item: skip
    max_failed_ratio: 0.1
  - id: coco
    use: eval/coco
    in: {annotations: ./data/ann.json, detections: ./detections.parquet, classes: ./data/classes.json}
";

/// Two objects on each image, `[x, y, width, height]`, and their classes.
const OBJECTS: [([f32; 4], u64); 2] = [([2.0, 2.0, 9.0, 9.0], 1), ([15.0, 5.0, 10.0, 10.0], 2)];
const N_IMAGES: u64 = 20;

/// How many of the two objects are found on an image.
fn n_found(id: u64) -> usize {
    match id {
        ..=8 => 0,
        9..=14 => 1,
        15.. => 2,
    }
}

/// Images in a folder that is neither in the home nor beside it; one of them is broken.
fn photos(folder: &World) -> World {
    let world = World::new();
    let image = |id: u64| json!({"id": id, "file_name": format!("birds/<{id}>.png"), "width": 33, "height": 21});
    let object = |(place, (bbox, class)): (u64, ([f32; 4], u64))| json!({"id": place + 1, "image_id": 1 + place / 2, "category_id": class, "bbox": bbox, "area": 81, "iscrowd": 0});
    let objects = (1..=N_IMAGES).flat_map(|_| OBJECTS);
    let annotations = json!({
        "images": (1..=N_IMAGES).map(image).collect::<Vec<_>>(),
        "annotations": (0..).zip(objects).map(object).collect::<Vec<_>>(),
        "categories": [{"id": 1, "name": "owl & co"}, {"id": 2, "name": "wren"}],
    });
    world.write("data/ann.json", annotations.to_string());
    world.write("data/classes.json", r#"{"base": ["owl & co"], "novel": ["wren"]}"#);
    world.write("clip.pt", fs::read(format!("{REPORTS}/09-image-not-there-with-skip/clip.pt")).unwrap());
    for id in 1..=N_IMAGES {
        folder.write(&format!("birds/<{id}>.png"), fs::read(format!("{GOLDEN}/images/rgb.png")).unwrap());
    }
    folder.write("birds/<3>.png", "cut");
    let detections = (1..=N_IMAGES).flat_map(|id| {
        OBJECTS.into_iter().enumerate().map(move |(place, ([x, y, width, height], class))| {
            let category_id = if place < n_found(id) { class } else { 3 - class };
            let xyxy = [x, y, x + width, y + height].into();
            Detection { image_id: ImageId(id), category_id: CategoryId(category_id), xyxy, score: 0.9 - 0.1 * place as f32, mask: None }
        })
    });
    write_detections(&world, Annotations::load(&world.path("data/ann.json")).unwrap(), &detections.collect::<Vec<_>>());
    world.write("photos.yaml", PIPELINE.replace("PHOTOS", &folder.path("").display().to_string()));
    world
}

/// The ids of the images below a heading, by their captions.
fn below(page: &str, heading: &str) -> Vec<u64> {
    let (_, group) = page.split_once(&format!("<h3>{heading}</h3>")).unwrap();
    let (group, _) = group.split_once("</div></div>").unwrap();
    let captions = group.split("<figcaption>").skip(1);
    captions
        .map(|caption| {
            let (name, rest) = caption.strip_prefix("<strong>birds/&lt;").unwrap().split_once("&gt;.png</strong> image ").unwrap();
            let (id, rest) = rest.split_once(". ").unwrap();
            assert_eq!(name, id);
            let id = id.parse().unwrap();
            assert!(rest.starts_with(&format!("{} of 2 objects found.", n_found(id))), "{caption}");
            id
        })
        .collect()
}

const GONE: &str = "<strong>The image cannot be shown:</strong>";

#[test]
fn a_report_shows_images_of_any_folder_and_says_where_one_is_gone() {
    let folder = World::new();
    let world = photos(&folder);
    world.run(["run", "./photos.yaml"]).success();
    let page = |name: &str| {
        world.run(["report", "-o", name]).success();
        fs::read_to_string(world.path(name)).unwrap()
    };
    let first = page("first.html");
    assert_eq!(below(&first, "Worst"), [1, 2, 3, 4, 5, 6]);
    assert_eq!(below(&first, "Best"), [15, 16, 17, 18, 19, 20]);
    let random = below(&first, "Random");
    assert!(random.len() == 6 && random.iter().all(|id| (7..=14).contains(id)), "{random:?}");
    assert_eq!((first.matches("data:image/jpeg;base64,").count(), first.matches(GONE).count()), (17, 1));
    for words in [
        "The score of an image with n annotated objects: ",
        ">owl &amp; co 0.90 ✓</text>",
        "★ wren",
        "\">owl &amp; co</option>",
        "\">&#9733; wren</option>",
        // The broken one is named with its reason, and counted at the top.
        "1 item skipped</a> (globals 1)",
        "<td>birds/&lt;3&gt;.png</td><td class=\"words\">",
    ] {
        assert!(first.contains(words), "{words}");
    }
    assert!(!first.contains("has changed since"));
    assert_eq!(page("second.html"), first);

    fs::remove_file(folder.path("birds/<16>.png")).unwrap();
    let second = page("second.html");
    assert!(second.contains("The folder of images that `globals` read has changed since"));
    assert_eq!((second.matches("data:image/jpeg;base64,").count(), second.matches(GONE).count()), (16, 2));
    assert!(second.contains(&format!("{GONE} birds/&lt;16&gt;.png: not in the folder of images (19 files)")), "{second}");
    // The report beside the log is not replaced by one without images.
    let gone = folder.path("birds");
    fs::rename(&gone, folder.path("moved")).unwrap();
    assert!(page("second.html").contains("None: no step of the run reads the images of `coco`, or they are gone."));
    assert!(world.run(["report"]).success().stdout.contains("not replaced, because a new report would not show pictures"));
    fs::rename(folder.path("moved"), gone).unwrap();
    // Annotations that changed are not those that the numbers are of.
    world.write("data/ann.json", fs::read_to_string(world.path("data/ann.json")).unwrap().replace("wren", "gull"));
    let third = page("third.html");
    assert!(third.contains("<li>pictures: ") && third.contains("data/ann.json: ") && !third.contains("<figure><svg viewBox=\"0 0 33 21\""));
}
